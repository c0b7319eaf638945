"""The model card and the example: what somebody needs who has only the folder."""

import json
from collections.abc import Mapping
from typing import Any

from torchrelay.report.export.formats import INT8, ONNX, PROGRAM
from torchrelay.report.export.intervals import RESAMPLES

_PIPELINES = {  # names of Hugging Face's for what a model does
    ("classes", "images"): "image-classification",
    ("classes", "inputs"): "tabular-classification",
    ("values", "inputs"): "tabular-regression",
    ("tokens", "tokens"): "text-generation",
}
_PATHS = ("root", "cache_dir", "code")  # of a recipe; they say where somebody's files are
_METHODS = {
    "Wilson": "Wilson's score interval (1927)",
    "bootstrap": f"the percentile bootstrap over samples ({RESAMPLES:,} resamples; 200 for F1 and the like)",
}


def model_card(facts: Mapping[str, Any], recipe: str) -> str:
    """Return the card in Hugging Face's format: YAML between dashes, then Markdown.

    Args:
        facts: what `export.json` says.
        recipe: the run's, as TOML.
    """
    parts = [
        f"---\n{_front_matter(facts)}---\n\n# {facts['name']}",
        _what(facts),
        _use(facts),
        _metrics(facts),
        _calibration(facts),
        _proof(facts),
        _limits(facts),
        f"## How it was trained\n\nBy torchrelay {facts['torchrelay']} with PyTorch {facts['trained_with']}, "
        f"up to step {facts['step']:,}, with this recipe:\n\n```toml\n{recipe.strip()}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def recipe_text(record: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a run's record as TOML, without what names folders of the machine that trained it."""
    import tomli_w

    shown = {name: {k: v for k, v in part.items() if k not in _PATHS} for name, part in record.items()}
    return tomli_w.dumps(shown)


def _front_matter(facts: Mapping[str, Any]) -> str:
    """Return the card's metadata. JSON is YAML as well, and quotes whatever a class may be called."""
    given = facts["input"] or {"name": ""}
    pipeline = _PIPELINES.get((facts["kind"], given["name"]))
    task = {"type": pipeline or "other"}
    data = {"type": facts["data"]["name"], "name": facts["data"]["name"], "split": facts["data"]["proof"]}
    metrics = [
        {"type": name, "value": round(metric["value"], 6), "name": name.replace("_", " ")}
        for name, metric in facts["metrics"].items()
        if metric["value"] is not None
    ]
    front: dict[str, Any] = {"library_name": "torchrelay", "tags": ["torchrelay", "pytorch", "onnx"]}
    if pipeline:
        front["pipeline_tag"] = pipeline
    if metrics:
        results = [{"task": task, "dataset": data, "metrics": metrics}]
        front["model-index"] = [{"name": facts["name"], "results": results}]
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in front.items())


def _what(facts: Mapping[str, Any]) -> str:
    classes, given = facts["classes"], facts["input"]
    lines = [f"{facts['model']}, {facts['parameters']:,} parameters, trained by `{facts['task']}`."]
    if given:
        lines.append(
            f"It takes `{given['name']}`, {given['dtype']} of shape (batch, {', '.join(map(str, given['shape']))})."
        )
        if given["name"] == "images":
            _, height, width = given["shape"]
            lines.append(
                "Raw pixels, from 0 to 255: resizing, cropping and normalization of the training are inside."
                if given["dtype"] == "uint8"
                else "Pixels from 0 to 1: the normalization of the training is inside."
            )
            lines.append(
                f"A file is decoded outside, its center cropped to the shape of {width} x {height} and resized to it."
            )
        lines.append(f"It gives `{'`, `'.join(facts['outputs'])}`.")
    if classes:
        shown = ", ".join(json.dumps(name, ensure_ascii=False) for name in classes[:20])
        more = f" and {len(classes) - 20} more, in `export.json`" if len(classes) > 20 else ""
        lines.append(f"\n\nClasses, in the order of the outputs: {shown}{more}.")
    data = facts["data"]
    lines.append(
        f"\n\nData: {data['name']}, {data['train']:,} training samples"
        + (f", {data['samples']:,} {data['proof']} samples." if data["proof"] else ", none to test with.")
    )
    return " ".join(lines).replace(" \n", "\n")


def _use(facts: Mapping[str, Any]) -> str:
    if not any(row["file"] == ONNX for row in facts["proof"]):
        return ""
    return f"## Use\n\n```python\n{example(facts).strip()}\n```"


def _metrics(facts: Mapping[str, Any]) -> str:
    if not facts["metrics"]:
        return ""
    data = facts["data"]
    lines = [f"## Metrics\n\nOf {data['samples']:,} {data['proof']} samples, with 95% confidence intervals.\n"]
    lines += ["| metric | value | interval |", "| --- | --- | --- |"]
    for name, metric in facts["metrics"].items():
        bounds = "" if metric["low"] is None else f"{metric['low']:.4f} to {metric['high']:.4f} ({metric['method']})"
        lines.append(f"| {name.replace('_', ' ')} | {metric['value']:.4f} | {bounds} |")
    used = {metric["method"] for metric in facts["metrics"].values()}
    lines.append("\n" + "; ".join(f"{name}: {text}" for name, text in _METHODS.items() if name in used) + ".")
    if data["proof"] != "test":
        lines.append(
            f"\n**There was no test data**: the {data['proof']} data had a part in the training or the choice of the "
            "model."
        )
    elif not data["validation"]:
        lines.append(
            "\nBest checkpoints were chosen by these same samples, as there was no validation data: their metrics are "
            "somewhat too good."
        )
    return "\n".join(lines)


def _calibration(facts: Mapping[str, Any]) -> str:
    if facts["kind"] == "values":
        return ""
    found = facts["calibration"]
    if not found:
        return (
            "## Calibration\n\nThe probabilities are as the network gives them: there was no validation data to fit a "
            "temperature to."
        )
    before, after = found["before"], found["after"]
    return (
        f"## Calibration\n\nThe logits are divided by a temperature of {facts['temperature']:.4f}, fitted to "
        f"{found['samples']:,} validation samples (Guo et al., 2017). On the {facts['data']['proof']} data the cross "
        f"entropy goes from {before['loss']:.4f} to {after['loss']:.4f}, the expected calibration error (15 bins) from "
        f"{before['error']:.4f} to {after['error']:.4f}."
    )


def _proof(facts: Mapping[str, Any]) -> str:
    if not facts["proof"]:
        return ""
    data = facts["data"]
    lines = [
        f"## Files\n\nEach answered all {data['samples']:,} {data['proof']} samples. Differences are from the run's "
        f"own predictions; latencies are of one sample, on {facts['processor']} with {facts['threads']} "
        f"thread{'s' if facts['threads'] > 1 else ''}.\n",
        f"| | file | size | largest difference | flipped answers | {facts['headline'].replace('_', ' ')} | p50 | p95 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in facts["proof"]:
        flipped = "" if row["flipped"] is None else f"{row['flipped']:,}"
        headline = "" if row["headline"] is None else f"{row['headline']:.4f}"
        file = f"`{row['file']}`" if row["file"] else ""
        times = f"{row['p50'] * 1000:.2f} ms | {row['p95'] * 1000:.2f} ms"
        size = f"{row['size'] / 1000:,.0f} kB"
        lines.append(
            f"| {row['form']} | {file} | {size} | {row['largest_difference']:.1e} | {flipped} | {headline} | {times} |"
        )
    lines.append(
        "\n`golden.safetensors` holds some samples with the answers; `torchrelay export --verify FOLDER` answers them "
        "again, and `sha256sum -c SHA256SUMS` finds a damaged file."
    )
    by_file = {row["file"]: row["headline"] for row in facts["proof"]}
    if INT8 in by_file:
        whole, integers = by_file[ONNX], by_file[INT8]
        change = (
            ""
            if whole is None
            else f"; they change the {facts['headline'].replace('_', ' ')} by {integers - whole:+.4f}"
        )
        lines.append(
            f"\n`{INT8}` computes in integers of 8 bits, whose ranges are from {facts['calibrated_on']:,} training "
            f"samples{change}."
        )
    return "\n".join(lines)


def _limits(facts: Mapping[str, Any]) -> str:
    lines = [
        "## Limits\n",
        "- The metrics hold for data like the test data. How the model does on other data, or for groups within the "
        "data, wasn't measured.",
        "- No license is stated: its author has to add one before it is passed on.",
        f"- `{PROGRAM}` may need the release of PyTorch that wrote it, {facts['torch']}. Loading such a file can run "
        "code: load it only if you trust its author.",
    ]
    lines += [f"- {problem}" for problem in facts["problems"]]
    return "\n".join(lines)


_IMAGE = '''"""Classify a photograph: pip install onnxruntime pillow; python example.py PHOTO.jpg"""
import {imports}sys
import numpy as np, onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("model.onnx")
image = ImageOps.fit(Image.open(sys.argv[1]).convert("{mode}"), ({width}, {height}))
pixels = np.asarray(image).reshape(1, {height}, {width}, {channels}).transpose(0, 3, 1, 2)
(answer,) = session.run(["{output}"], {{"images": pixels}})[0]
{show}
'''
_OTHER = '''"""Answer the golden samples: pip install onnxruntime safetensors; python example.py"""
{imports}import onnxruntime
from safetensors.numpy import load_file

session = onnxruntime.InferenceSession("model.onnx")
inputs = load_file("golden.safetensors")["inputs"]  # {dtype} (samples, {shape})
answer = session.run(["{output}"], {{"{name}": inputs}})[0][0]
{show}
'''
_BEST = """classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
for i in np.argsort(-answer)[:3]:
    print(f"{classes[i]}: {answer[i]:.1%}")"""


def example(facts: Mapping[str, Any]) -> str:
    """Return a script that needs only onnxruntime, and Pillow for images."""
    given, output = facts["input"], facts["outputs"][0]
    named = facts["kind"] in ("classes", "labels") and len(facts["classes"]) > 1
    show = _BEST if named else "print(answer)"
    values = {"output": output, "show": show, "name": given["name"], "dtype": given["dtype"]}
    if given["name"] == "images" and given["shape"][0] in (1, 3):
        channels, height, width = given["shape"]
        scale = "" if given["dtype"] == "uint8" else ".astype(np.float32) / 255"
        mode = "L" if channels == 1 else "RGB"
        return _IMAGE.format(
            **values,
            imports="json, " if named else "",
            channels=channels,
            height=height,
            width=width,
            mode=mode,
            scale=scale,
        )
    imports = "import json\nimport numpy as np\n" if named else ""
    return _OTHER.format(**values, imports=imports, shape=", ".join(map(str, given["shape"])))
