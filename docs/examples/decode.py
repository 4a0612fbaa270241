"""Decodes with the library: a target, a draft, a prompt in; text and what it took out. No Ray, no server."""

import torch

from specdecode import create_backend, speculative_decode
from specdecode.text import Tokenizer


def main() -> None:
    """Decodes plainly and with a draft, and shows that both say the same."""
    target, draft = create_backend("tiny/target"), create_backend("tiny/draft-code")
    tokenizer = Tokenizer("tiny/target")
    prompt = torch.tensor([tokenizer.encode("def read_lines(path):\n")])
    plain, _ = speculative_decode(target, None, prompt, max_new_tokens=32)
    fast, metrics = speculative_decode(target, draft, prompt, max_new_tokens=32, K=4)
    print(tokenizer.decode(fast[0].tolist()))
    print("the same as without a draft:", torch.equal(plain, fast))
    print(f"{metrics.num_target_passes} passes of the target for {metrics.num_generated} tokens")


if __name__ == "__main__":
    main()
