"""Train a small vision transformer on digits, prune it to half of its layers' FLOPs, and compare it with the dense model.

The images are scikit-learn's 1,797 handwritten digits of 8 x 8 pixels (`pip install scikit-learn`).
"""

from __future__ import annotations

import sys
import time

import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import secateur

STEPS, BATCH, SCORED = 700, 64, 300


def main() -> None:
    """Train, prune, recover and compare."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("vit_digits: expected the package scikit-learn, got none: pip install scikit-learn")
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).to(torch.uint8).unsqueeze(1)
    examples = [{"image": image, "target": int(target)} for image, target in zip(images, digits.target, strict=True)]
    order = torch.randperm(len(examples)).tolist()
    train, test = [examples[k] for k in order[:1297]], [examples[k] for k in order[1297:]]

    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=256, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, do_resize=False, image_mean=[0.5], image_std=[0.5])
    task = secateur.ImageClassification(processor)
    started = time.perf_counter()
    fit(model, task, train)
    print(f"trained in {time.perf_counter() - started:.0f} s")

    scores = secateur.attribute(model, task, train[:SCORED])
    pruned = secateur.prune(model, secateur.plan(scores, flops=0.5, allocation="knapsack", floor=0.2))
    cut = secateur.evaluate(pruned, task, test)
    secateur.recover_(model, pruned, task, train[:SCORED])
    for name, evaluation in (
        ("dense", secateur.evaluate(model, task, test)),
        ("half of the layers' FLOPs", cut),
        ("the same, out-projections refitted", secateur.evaluate(pruned, task, test)),
    ):
        print(f"{name}: {evaluation}")
    print(f"parameters: {secateur.cost.parameters(model):,} dense, {secateur.cost.parameters(pruned):,} pruned")


def fit(model: ViTForImageClassification, task: secateur.ImageClassification, train: list[dict[str, object]]) -> None:
    """Train the model from scratch, in place."""
    batch = task.collate(task.items(model, train), torch.device("cpu"))
    pixels, labels = batch.inputs["pixel_values"], batch.labels.squeeze(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=STEPS)
    model.train()
    for _ in range(STEPS):
        rows = torch.randint(len(labels), (BATCH,))
        loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels[rows]).logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    model.eval()


if __name__ == "__main__":
    main()
