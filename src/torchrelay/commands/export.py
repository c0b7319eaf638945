"""`torchrelay export FOLDER`: write a run as a folder that is used without torchrelay, or verify such a folder."""

import argparse
from pathlib import Path

from torchrelay.commands.options import add_checkpoint, add_common, code_of, recipe_of_run, terminal_of
from torchrelay.errors import UsageError

HELP = "export a run as torch.export, ONNX and a model card, with proof; or verify an export"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the run's folder, or that of an export")
    parser.add_argument("--out", type=Path, metavar="PATH", help="the folder to write (FOLDER-export)")
    parser.add_argument("--force", action="store_true", help="replace an export that is there")
    parser.add_argument("--no-int8", action="store_true", help="leave out the model in 8-bit integers")
    add_checkpoint(parser)
    parser.add_argument("--sign", type=Path, metavar="KEY", help="sign the export with a private key (PEM)")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the export to this model on Hugging Face")
    parser.add_argument("--verify", action="store_true", help="FOLDER is an export: check it, and answer its samples")
    parser.add_argument("--key", type=Path, metavar="KEY", help="with --verify: the signer's public key (PEM)")
    add_common(parser)


def run(options: argparse.Namespace) -> None:
    """Export, sign and upload; or verify."""
    from torchrelay.report.export.folder import FACTS

    if options.verify:
        _verify(options)
        return
    if options.key is not None:
        raise UsageError("--key goes with --verify; to sign, give the private key by --sign")
    if options.sign is not None:
        from torchrelay.report.export.signature import signer

        signer(options.sign)  # before the work, if it can't be used
    target, say = options.folder, terminal_of(options).say
    if (target / FACTS).is_file():
        if options.sign is None and options.push is None:
            raise UsageError(f"{target} is an export already: give --verify, --sign or --push")
    else:
        target = options.out or options.folder.with_name(f"{options.folder.resolve().name}-export")
        _export(options, target)
        say(f"exported to {target}")
    if options.sign is not None:
        from torchrelay.report.export.signature import sign

        sign(target, options.sign)
        say(f"signed with {options.sign}")
    if options.push is not None:
        from torchrelay.report.export.push import push

        say(f"uploaded to {push(target, options.push)}")


def _verify(options: argparse.Namespace) -> None:
    from torchrelay.report.export.verify import verify

    if options.sign is not None or options.push is not None:
        raise UsageError("--verify only checks: give --sign or --push in a command of its own")
    verify(options.folder, options.key, terminal_of(options).say)


def _export(options: argparse.Namespace, target: Path) -> None:
    from torchrelay.checkpoint import read
    from torchrelay.checkpoint.retention import find
    from torchrelay.recipe.build import initial_model, load_data
    from torchrelay.recipe.trained import trained
    from torchrelay.report.export.export import Asked, Exporter
    from torchrelay.report.export.folder import check_target
    from torchrelay.report.export.formats import needed
    from torchrelay.run.record import read_record

    recipe, say = recipe_of_run(options), terminal_of(options).say
    check_target(target, options.force)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        needed(package)
    code = code_of(options)
    contents = read(find(options.folder / "checkpoints", options.checkpoint))
    parts = load_data(recipe, code, fresh=False, say=say)
    model = initial_model(recipe, parts.train, code, fresh=False, say=lambda _: None)
    found = trained(recipe, contents, code, model=model)
    name = options.folder.resolve().name
    Exporter(found, parts, name, read_record(options.folder), Asked(not options.no_int8, options.force), say).write(
        target
    )
