"""Runs whose files are written by hand: their recipe, and metrics of a few epochs."""

import json

import tomli_w


def write_run(folder, accuracies=(0.5, 0.75), done=True, **settings):
    folder.mkdir(parents=True)
    sections = {"run": {"seed": settings.pop("seed", 0)}}
    for name, value in settings.items():
        section, _, key = name.partition("_")
        sections.setdefault(section, {})[key] = value
    (folder / "recipe.toml").write_text(tomli_w.dumps(sections))
    (folder / "metrics.jsonl").touch()
    for epoch, accuracy in enumerate(accuracies, 1):
        train = {"step": 10 * epoch, "epoch": epoch, "split": "train", "loss": 1 / epoch, "seconds": 2.5}
        test = {"step": 10 * epoch, "epoch": epoch, "split": "test", "loss": 1.5, "accuracy": accuracy}
        with (folder / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in (train, test))
    if done:
        (folder / "evaluation.json").write_text(json.dumps({"step": 10 * len(accuracies)}))
    return folder
