"""Asks a running server with OpenAI's own client: `pip install openai`, then `specdecode serve` in another shell.

usage: python docs/examples/ask_server.py [BASE_URL]
"""

import sys

from openai import OpenAI


def main(base_url: str = "http://127.0.0.1:8000/v1") -> None:
    """Streams an answer, then asks for one with a draft that is named and prints what the draft did."""
    client = OpenAI(base_url=base_url, api_key="none")
    model = client.models.list().data[0].id
    message = {"role": "user", "content": "How do I read a file?"}
    for chunk in client.chat.completions.create(model=model, messages=[message], max_tokens=32, stream=True):
        print(chunk.choices[0].delta.content or "" if chunk.choices else "", end="", flush=True)
    print()
    extra = {"speculative_decoding": {"draft": "code", "K": 4}}
    answer = client.completions.create(
        model=model, prompt="def read_lines(path):\n", max_tokens=32, temperature=0, extra_body=extra
    )
    print(answer.choices[0].text)
    print(answer.model_extra["speculative_decoding"])


if __name__ == "__main__":
    main(*sys.argv[1:2])
