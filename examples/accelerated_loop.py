"""The same loop with Hugging Face's Accelerate: device, mixed precision and batches are its own.

pip install 'tfkd_ray[accelerate]'
loop: "accelerated_loop:train"
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from tfkd_ray import Epoch
from tfkd_ray.learn.evaluate import metric_sums, metrics_from


def train(config, state, teacher):
    accelerator = Accelerator(cpu=not config.gpus_per_worker)
    train_set, val_set = config.data.load()  # val_set is None where a final student is trained
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in config.data.statistics())
    images = TensorDataset((train_set.images - mean) / std, train_set.labels)
    student, objective = config.build_student(), config.objective.ready()
    optimizer = torch.optim.AdamW(student.parameters(), config.optim.lr)
    if state is not None:
        student.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    batches = DataLoader(images, config.optim.batch_size, shuffle=True)
    model, optimizer, batches = accelerator.prepare(student, optimizer, batches)
    for epoch in range(state["epoch"] if state else 0, config.epochs):
        model.train()
        for x, labels in batches:
            soft = None if teacher is None else teacher(x)
            loss = objective(model(x), labels, soft)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        metrics = {"epoch": epoch + 1, "train_loss": loss.item()}
        if val_set is not None:
            x = ((val_set.images - mean) / std).to(accelerator.device)
            with torch.no_grad():
                logits = model.eval()(x)
            metrics |= metrics_from(metric_sums(logits, val_set.labels.to(logits.device)))
        parts = {"model": accelerator.unwrap_model(model), "optimizer": optimizer}
        yield Epoch(metrics, parts_of(parts))


def parts_of(parts):
    return lambda: {name: part.state_dict() for name, part in parts.items()}
