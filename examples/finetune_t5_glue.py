"""Fine-tune a T5 on six GLUE and SuperGLUE sets at once. `secateur reproduce ap --preset paper` prunes the result.

    python examples/finetune_t5_glue.py --model google-t5/t5-base --out t5-glue
    secateur reproduce ap --model t5-glue --preset paper --out t5-glue-ap

Every step draws a task uniformly, and trains on a batch of it. The script checks the model on the validation sets now and then,
and keeps the model with the best mean accuracy. The settings are T5's usual ones (Raffel et al. 2020, arXiv 1910.10683):
Adafactor, a constant learning rate of 1e-3, batches of 128 examples, inputs cut to 512 word pieces.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from transformers import Adafactor, AutoModelForSeq2SeqLM, AutoTokenizer

import secateur
from secateur.reproduction.ap import glue


def main() -> None:
    """Read the data, train, and save the best model."""
    arguments = parse_arguments()
    random.seed(arguments.seed)
    torch.manual_seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForSeq2SeqLM.from_pretrained(arguments.model, dtype=torch.float32, trust_remote_code=False).to(device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=False)
    names = arguments.tasks.split(",")
    train = {name: glue.examples(name, "train", arguments.data_root) for name in names}
    test = {name: glue.examples(name, "validation", arguments.data_root) for name in names}
    tasks = {name: secateur.TextToText(tokenizer, labels=glue.SETS[name].labels, max_length=512) for name in names}
    settings = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    optimizer = Adafactor(model.parameters(), lr=arguments.learning_rate, **settings)

    best = -1.0
    for step in range(1, arguments.steps + 1):
        model.train()
        name = random.choice(names)
        rows = random.choices(train[name], k=arguments.batch)
        items = tasks[name].items(model, rows)
        total = 0.0
        for start in range(0, len(items), arguments.micro_batch):
            batch = tasks[name].collate(items[start : start + arguments.micro_batch], device)
            loss = -tasks[name].target(model, batch, "log_probability").sum() / len(items)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % arguments.check_every == 0 or step == arguments.steps:
            accuracies = {name: secateur.evaluate(model, tasks[name], test[name]).value for name in names}
            mean = sum(accuracies.values()) / len(accuracies)
            print(f"step {step}, loss {total:.3f}, accuracy {mean:.4f}: {accuracies}", flush=True)
            if mean > best:
                best = mean
                model.save_pretrained(arguments.out)
                tokenizer.save_pretrained(arguments.out)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google-t5/t5-base")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(glue.SETS))
    parser.add_argument("--data-root", type=Path, help="ROOT/NAME/SPLIT.parquet instead of the Hub")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--micro-batch", type=int, default=32, help="examples of one pass; a batch adds up several")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--check-every", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
