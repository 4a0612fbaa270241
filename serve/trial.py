"""A stranger's grammar in, nothing out, or why it is refused: it is compiled in a process of its own first.

A few kilobytes of grammar can overflow the stack of whoever compiles them, or take minutes and all memory. The process has
little of either, and it is no matter if it dies.
"""

import functools
import subprocess
import sys

from specdecode.errors import RequestError
from specdecode.grammar import Grammar

TIMEOUT_S = 5.0
MAX_BYTES = 2 << 30  # of addresses, most of which are never used
_NUM_REMEMBERED = 256
# Only llguidance is imported, which takes milliseconds. The stack is half of what the threads of a replica have.
_SCRIPT = """
import resource, sys
max_bytes, seconds = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_STACK, (4 << 20, resource.RLIM_INFINITY))
import threading
threading.stack_size(4 << 20)
from llguidance import LLMatcher, LLTokenizer
def compile():
    LLMatcher(LLTokenizer("byte"), source, log_level=0).compute_bitmask()
source = sys.stdin.read()
thread = threading.Thread(target=compile)
thread.start()
thread.join()
"""


@functools.lru_cache(_NUM_REMEMBERED)
def try_grammar(grammar: Grammar) -> None:
    """Compiles a grammar elsewhere, and forgets the result; mistakes in it are found when it is compiled again.

    Raises:
        RequestError: it takes too long, too much memory or too much stack.
    """
    command = [sys.executable, "-I", "-c", _SCRIPT, str(MAX_BYTES), str(int(TIMEOUT_S))]
    source = grammar.source.encode()
    try:
        trial = subprocess.run(command, input=source, capture_output=True, timeout=4 * TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        pass
    else:
        if trial.returncode == 0:
            return
    raise RequestError(f"{grammar.field}: expected a grammar that is less complex", grammar.field)
