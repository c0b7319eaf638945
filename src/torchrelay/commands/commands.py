"""What each command of the command line does, in calls that a user can make from Python."""

import argparse
import glob
import json
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from torchrelay.distributed import launch, launched
from torchrelay.errors import UsageError
from torchrelay.recipe import build as assemble
from torchrelay.recipe import recipe
from torchrelay.run.folder import free_folder
from torchrelay.run.terminal import Terminal
from torchrelay.train.trainer import Trainer


def train(options: argparse.Namespace) -> None:
    """`torchrelay train RECIPE`: train, in a new run folder."""
    loaded = recipe.load(options.recipe, options.overrides)
    folder = options.run or _own_folder(_run_name(options.recipe, options.overrides))
    if _several(options, loaded, folder, "--run", str(folder)):
        return
    again = launched.goes_on(folder)  # rank 0's answer counts for all
    trainer = assemble.trainer(loaded, folder, code=_code(options.code), terminal=_terminal(options), fresh=not again)
    if again:
        trainer.resume()
    else:
        launched.mark(folder)
        trainer.fit()
    trainer.terminal.say(f"the run is in {folder}")


def resume(options: argparse.Namespace) -> None:
    """`torchrelay resume FOLDER`: go on from the newest whole checkpoint."""
    loaded = _recipe_of_run(options)
    if not _several(options, loaded, options.folder):
        _trainer_of_run(options, loaded).resume(accept_changes=options.accept_changes)


def evaluate(options: argparse.Namespace) -> None:
    """`torchrelay evaluate FOLDER`: test a run's best network."""
    loaded = _recipe_of_run(options)
    if _several(options, loaded, options.folder):
        return
    trainer = _trainer_of_run(options, loaded)
    checkpoint = trainer.load(options.checkpoint)
    found = {split: trainer.evaluate(split) for split in trainer.evaluated}
    if launched.rank() > 0:
        return
    if options.json:
        tables = {split: evaluation.to_json(trainer.classes) for split, evaluation in found.items()}
        print(json.dumps({"checkpoint": str(checkpoint), **tables}, ensure_ascii=False))
        return
    print(checkpoint)
    for split, evaluation in found.items():
        values = (f"{name.replace('_', ' ')} {value:.4f}" for name, value in evaluation.values.items())
        print("   ".join([f"{split} ({evaluation.samples:,} samples)", *values]))
        for name, row in evaluation.tables.items():
            print(f"  {name.replace('_', ' ')}")
            named = evaluation.by_class(row, trainer.classes)
            width = max(map(len, named))
            for label, value in named.items():
                print(f"    {label:<{width}}  {value:.4f}")


def predict(options: argparse.Namespace) -> None:
    """`torchrelay predict FOLDER PATH…`: say what a run's network sees in images. The training data isn't needed."""
    if options.top < 1:
        raise UsageError(f"--top {options.top}: show 1 class or more")
    loaded, code = _recipe_of_run(options), _code(options.code)
    paths = [path for given in options.paths for path in _images(given)]
    predictor = assemble.predictor(loaded, options.folder, options.checkpoint, code=code)
    probabilities = predictor.images(paths)
    ranked = probabilities.topk(min(options.top, probabilities.shape[1]))
    rows = [
        {str(predictor.classes[c]): round(p, 6) for p, c in zip(values, indices, strict=True)}
        for values, indices in zip(ranked.values.tolist(), ranked.indices.tolist(), strict=True)
    ]
    if options.json:
        found = [{"path": str(path), "classes": row} for path, row in zip(paths, rows, strict=True)]
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    width = max(len(str(path)) for path in paths)
    for path, row in zip(paths, rows, strict=True):
        print(f"{path!s:<{width}}  " + "   ".join(f"{name} {p:.1%}" for name, p in row.items()))


def show_recipe(options: argparse.Namespace) -> None:
    """`torchrelay recipe NAME`: print a recipe, resolved."""
    if options.schema:
        sys.stdout.write(recipe.schema())
        return
    if options.recipe is None:
        raise UsageError("recipe needs a name or a file: 'torchrelay recipes' lists the shipped ones")
    sys.stdout.write(recipe.load(options.recipe, options.overrides).to_toml())


def list_recipes(_options: argparse.Namespace) -> None:
    """`torchrelay recipes`: list the shipped recipes."""
    names = recipe.names()
    width = max(map(len, names))
    for name, header in names.items():
        print(f"{name:<{width}}  {header}")


def doctor(_options: argparse.Namespace) -> None:
    """`torchrelay doctor`: show what this machine has and what would be used."""
    from torchrelay.commands.doctor import examine

    examine()


def profile(options: argparse.Namespace) -> None:
    """`torchrelay profile RECIPE`: show where a step's time goes."""
    from torchrelay.commands import profiling

    loaded = recipe.load(options.recipe, options.overrides)
    folder = options.out or free_folder(_run_name(options.recipe, options.overrides), Path("profiles"))
    trainer = assemble.trainer(loaded, code=_code(options.code), terminal=_terminal(options))
    profiling.show(profiling.examine(trainer, options.steps, folder), folder)


def tune(options: argparse.Namespace) -> None:
    """`torchrelay tune RECIPE`: time device settings, and print the lines to keep."""
    from torchrelay.commands import tuning

    loaded, code = recipe.load(options.recipe, options.overrides), _code(options.code)
    tuning.show(tuning.tune(loaded, options.seconds, code=code, say=_terminal(options).say))


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "train": train,
    "resume": resume,
    "evaluate": evaluate,
    "predict": predict,
    "recipe": show_recipe,
    "recipes": list_recipes,
    "doctor": doctor,
    "profile": profile,
    "tune": tune,
}


def _run_name(given: str, overrides: Sequence[str]) -> str:
    """Return a run's name: the recipe's, and what was changed of it."""
    changed = [re.sub(r"[^\w.=+-]+", "_", override) for override in overrides]
    return "-".join([Path(given).stem, *changed])[:120]


def _code(path: Path | None) -> ModuleType | None:
    return None if path is None else assemble.load_code(path)


def _recipe_of_run(options: argparse.Namespace) -> recipe.Recipe:
    """Return the recipe in a run's folder with the overrides applied."""
    file = options.folder / "recipe.toml"
    if not file.is_file():
        raise UsageError(
            f"{options.folder} is no run: it has no recipe.toml; give a folder that 'torchrelay train' made"
        )
    started = tomllib.loads(file.read_text(encoding="utf-8")).get("environment", {})
    if started.get("started_from") == "python":
        raise UsageError(
            f"{options.folder} was started from Python: call trainer.resume() or .load() in the script that did it"
        )
    if "code" in started and options.code is None:
        raise UsageError(f"{options.folder} uses code of its own: add --code {started['code']}")
    return recipe.load(str(file), options.overrides)


def _trainer_of_run(options: argparse.Namespace, loaded: recipe.Recipe) -> Trainer:
    code, terminal = _code(options.code), _terminal(options)
    return assemble.trainer(loaded, options.folder, code=code, terminal=terminal, fresh=False)


def _terminal(options: argparse.Namespace) -> Terminal:
    """Return where people read along: of several processes, rank 0 speaks; others do if they have a file for it."""
    quiet = options.quiet or getattr(options, "json", False)  # JSON stands alone on standard output
    return Terminal(quiet=quiet or (launched.rank() > 0 and not launched.by_us()))


def _own_folder(name: str) -> Path:
    """Return the folder of a run that this launch has started before, or a free one."""
    there = sorted(Path("runs").glob(f"{glob.escape(name)}*"))
    return next((folder for folder in there if launched.goes_on(folder)), None) or free_folder(name)


def _several(options: argparse.Namespace, loaded: recipe.Recipe, folder: Path, *more: str) -> bool:
    """Run this command in as many processes as `--devices` says; return False where this process is to do it."""
    if options.devices == 1 or launched.by_us():
        return False
    if loaded.parallel.kind == "dp":
        raise UsageError(
            f"--devices {options.devices}: parallel.kind 'dp' is one process on all devices that it sees: leave "
            "--devices out, and choose the devices by CUDA_VISIBLE_DEVICES"
        )
    launch.check_devices(loaded.device.name, options.devices)
    command, *rest = options.arguments
    launch.start(
        [command, *more, *rest],
        options.devices,
        folder,
        threads=loaded.device.threads,
        restarts=options.restarts,
        shutdown_timeout=options.shutdown_timeout,
        port=options.port,
    )
    return True


def _images(path: Path) -> list[Path]:
    """Return an image's path, or those of all images below a folder."""
    from torchrelay.data.folder import is_image

    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if is_image(p))
        if not found:
            raise UsageError(f"{path} has no images in it")
        return found
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    return [path]
