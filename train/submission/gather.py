"""The numbers of a run, gathered from what its stages left in the folder, so that any stage can be done again alone."""

from __future__ import annotations

from train.artifact import read_artifact
from train.common.errors import UserError
from train.common.files import read_json
from train.data.manifest import read_manifest
from train.evaluate.scores import find_evaluation
from train.run.folder import RunFolder
from train.run.logger import read_metrics, resumed_steps
from train.submission.summary import Summary, group_bytes


def summarize(folder: RunFolder) -> Summary:
    """Gather a run's numbers from what its stages left in its folder.

    Raises:
        UserError: a stage has not run, or the artifact is newer than its score.
    """
    config, asked = folder.trained_config(), folder.read_config()
    training = folder.read_training(
        steps=int, seconds=float, date=str, hardware=str, torch=str, python=str, first=dict, last=dict
    )
    score = find_evaluation(folder, config)
    flat = find_evaluation(folder, config.replace(eval_stride=0))
    artifact = read_artifact(folder.artifact)
    # as logged when the artifact was written: the sources may have changed since
    records = read_metrics(folder.metrics)
    sizes = [record for record in records if record["kind"] == "sizes" and isinstance(record.get("code_bytes"), int)]
    if not sizes:
        raise UserError(f"{folder.metrics}: no sizes in it: run python -m train.quantize {folder.path} again")
    stage_seconds = read_json(folder.stages, "delete it") if folder.stages.exists() else {}
    resumed = resumed_steps(records)
    if resumed:
        # no process saw all of it, and what a kill lost is in none of its steps
        stage_seconds["train"] = training["seconds"]
    bytes_code, bytes_prefix = sizes[-1]["code_bytes"], sizes[-1].get("prefix_bytes", 0)
    manifest = read_manifest(config.data_path)
    # the compressors did not stop at eval_max_tokens
    condition = "after the training text" + (" and over more text" if config.eval_max_tokens else "")
    return Summary(
        run_id=folder.path.name,
        recipe=config.recipe,
        seed=config.seed,
        date=training["date"],
        steps=training["steps"],
        step_avg_ms=1000 * training["seconds"] / max(training["steps"], 1),
        train_seconds=training["seconds"],
        stage_seconds=stage_seconds,
        resumed=resumed,
        recurrence_missed=0 if asked.recur_layers == config.recur_layers else asked.recur_start_step,
        val_loss=score["val_loss"],
        val_bpb=score["val_bpb"],
        eval_seconds=score["seconds"],
        tokens=score["tokens"],
        bytes=score["bytes"],
        bytes_code=bytes_code,
        bytes_model=artifact.info.model_bytes,
        bytes_prefix=bytes_prefix,
        bytes_total=bytes_code + bytes_prefix + artifact.info.model_bytes,
        max_bytes=config.max_artifact_bytes,
        target_bytes=config.pruning_target_bytes,
        parameters=sum(tensor.shape.numel() for tensor in artifact.tensors.values()),
        hardware=training["hardware"],
        torch=training["torch"],
        python=training["python"],
        step0_val_bpb=training["first"].get("val_bpb"),
        prequant_val_bpb=training["last"].get("val_bpb"),
        flat_val_bpb=flat["val_bpb"],
        yardsticks={f"{name} {condition}": value for name, value in (manifest.yardsticks if manifest else {}).items()},
        label=score.get("label", ""),
        model_groups=group_bytes(artifact.info.rows()),
    )
