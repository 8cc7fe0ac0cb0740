"""A training loop of your own in plain PyTorch: AdamW, where tfkd's loop has SGD.

loop: {path: "own_loop:train", args: {beta2: {low: 0.9, high: 0.999}}}
"""

import torch

from tfkd_ray import Epoch
from tfkd_ray.learn.evaluate import metric_sums, metrics_from


def train(config, state, teacher, beta2=0.999):
    train_set, val_set = config.data.load()  # val_set is None where a final student is trained
    device = "cuda" if config.gpus_per_worker else "cpu"
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in config.data.statistics())
    images = ((train_set.images - mean) / std).to(device)
    labels = train_set.labels.to(device)
    student, objective = config.build_student().to(device), config.objective.ready()
    settings = {"lr": config.optim.lr, "weight_decay": config.optim.weight_decay}
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, beta2), **settings)
    if state is not None:
        student.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    parts = {"model": student, "optimizer": optimizer}
    for epoch in range(state["epoch"] if state else 0, config.epochs):
        student.train()
        for batch in torch.randperm(len(labels)).split(config.optim.batch_size):
            soft = None if teacher is None else teacher(images[batch])
            loss = objective(student(images[batch]), labels[batch], soft)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        metrics = {"epoch": epoch + 1, "train_loss": loss.item()}
        if val_set is not None:
            with torch.no_grad():
                logits = student.eval()(((val_set.images - mean) / std).to(device))
            metrics |= metrics_from(metric_sums(logits.cpu(), val_set.labels))
        yield Epoch(metrics, lambda: {name: part.state_dict() for name, part in parts.items()})
