"""Compiles one grammar, within limits. As a program it tries grammars for the trusted side, in a process that may die.

It lies outside `sliplm.trusted`, and imports little: the process has to start fast and to hold nothing else.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
from pathlib import Path

import llguidance

CPU_SECONDS = 2.0
MEMORY_BYTES = 1 << 30
STACK_BYTES = 1 << 20
"""What compiling a grammar may take. The stack is less than a thread of the trusted side has, so that what gets by with
it here gets by there."""

_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=200_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    precompute_large_lexemes=True,  # without it, some patterns escape the other limits
    verbose_errors=False,
)
"""Of memory and of steps. The time that it takes to compile has none but those of `main`."""


def load(tokenizer: str, ends: list[int]) -> llguidance.LLTokenizer:
    """A tokenizer from its JSON, for grammars. Raises whatever llguidance does for kinds that it does not know."""
    return llguidance.LLTokenizer(tokenizer, eos_token=ends)


def compiled(tokens: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """A matcher at its beginning. Raises ValueError: with a reason if the grammar is not supported, with an empty one
    if it is too complex."""
    matcher = llguidance.LLMatcher(tokens, grammar, log_level=0, limits=_LIMITS)
    if matcher.is_error():
        raise ValueError(_reason(matcher.get_error()))
    matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError("")
    return matcher


def _reason(error: str) -> str:
    """The sentence in llguidance's message, without the grammar that it quotes."""
    sentence = error.partition("\n")[0].rpartition("failed to compile JSON schema: ")[2]
    return re.sub(r"^at \d+\(\d+\): ", "", sentence)[:200].rstrip(". ") or "no reason is known"


def main() -> None:
    """Read lines of JSON: a tokenizer and its end tokens, then grammars. Answer each with null, or with the text of the
    ValueError. A grammar that takes too much ends the process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, STACK_BYTES))
    tokens = load(*json.loads(sys.stdin.readline()))
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, now + MEMORY_BYTES))
    print("null", flush=True)
    for line in sys.stdin:
        grammar, answer = json.loads(line), None
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF ends a process in the middle of whatever it does
        try:
            compiled(tokens, grammar)
        except ValueError as error:
            answer = str(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
