"""Write what the training of the tiny base starts from: corpus, tokenizer and first weights.

    python recipes/tiny-base/make.py WORK

writes WORK/copying and WORK/corpus (train.jsonl and valid.jsonl of language.py's rows) and
WORK/init (a model directory with random weights); with --task DIRECTORY also the sample task's
files (task.py). The README says what to run next.
"""

import argparse
import ctypes
import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if sys.platform == "linux":  # MLX's own BLAS there is slow; OpenBLAS must be loaded before MLX
    try:
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        print("libopenblas not found: multiplications will be slow", file=sys.stderr)

import language
import shape
import task
import tokenizer

TOKENIZER_ROWS = 20_000  # enough for the frequencies of a small vocabulary
VALID_ROWS = 500
CORPUS_SEED, VALID_SEED, TASK_SEED = 1, 2, 7


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def make(work: Path, count: int) -> None:
    """Write the corpus of count rows, the tokenizer and the untrained model below work."""
    for name, rows in (("corpus", language.rows), ("copying", language.copying)):
        write_rows(work / name / "train.jsonl", rows(CORPUS_SEED, count))
        write_rows(work / name / "valid.jsonl", rows(VALID_SEED, VALID_ROWS))
    sample = itertools.islice(language.rows(CORPUS_SEED, count), TOKENIZER_ROWS)
    learned = tokenizer.train(turn["content"] for row in sample for turn in row["messages"])
    tokenizer.save(learned, work / "init")
    shape.save(
        work / "init",
        vocabulary=learned.get_vocab_size(),
        eos=tokenizer.SPECIAL.index(tokenizer.END_OF_TURN),
        pad=tokenizer.SPECIAL.index(tokenizer.END_OF_TEXT),
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Prepare the training of the tiny base.")
    parser.add_argument("work", type=Path, help="directory to write into")
    parser.add_argument("--rows", type=int, default=80_000, help="rows of each corpus")
    parser.add_argument("--task", type=Path, help="also write the sample task's files here")
    arguments = parser.parse_args()
    make(arguments.work, arguments.rows)
    if arguments.task:
        task.write(arguments.task, TASK_SEED)


if __name__ == "__main__":
    main()
