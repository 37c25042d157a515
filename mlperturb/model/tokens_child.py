"""The process that turns texts into token numbers, with the tokenizer of a folder; see `mlperturb.model.tokens`.

It reads one JSON object from stdin and writes one to stdout. It does not import mlperturb.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def limit(memory: int, seconds: int) -> None:
    """Let this process take so much more memory, in bytes, and so much time, where the system can say so."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform.startswith("linux"):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        wanted = used + memory if hard == resource.RLIM_INFINITY else min(used + memory, hard)
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


def tokenise(asked: dict[str, Any]) -> dict[str, Any]:
    """Return the token numbers of texts, filled up to one length, and where the tokenizer says so their mask.

    Args:
        asked: `folder`, the `kind` of the tokenizer, `texts`, the `longest` that may be, `whole`: fill up to it.
    """
    import transformers

    tokenizer = getattr(transformers, asked["kind"]).from_pretrained(
        asked["folder"], local_files_only=True, trust_remote_code=False
    )
    texts, longest = asked["texts"], asked["longest"]
    lengths = [len(one) for one in tokenizer(texts, truncation=False)["input_ids"]]
    for text, length in zip(texts, lengths, strict=True):
        if length > longest:
            return {"error": f"expected prompts of at most {longest} tokens, got {length}: {text!r:.80}"}
    fill = {"padding": "max_length", "max_length": longest} if asked["whole"] else {"padding": True}
    found = tokenizer(texts, truncation=False, **fill)
    return {"ids": found["input_ids"], "mask": found.get("attention_mask")}


def main() -> None:
    """Answer the object on stdin."""
    asked = json.load(sys.stdin)
    limit(asked["memory"], asked["seconds"])
    try:
        answer = tokenise(asked)
    except MemoryError:
        raise
    except BaseException as error:  # the library may raise anything at a damaged file, and so does its Rust
        line = " ".join(str(error).partition("\n")[0].split()) or type(error).__name__
        answer = {"error": f"transformers cannot read the tokenizer: {line:.200}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
