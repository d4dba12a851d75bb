#!/usr/bin/env python
"""Enrolls speakers: minutes of each one's speech become a voice file, many at once, by Initial-State Tuning.

    python jobs/enroll.py --speakers speakers.jsonl --output voices/
    ray job submit -- python jobs/enroll.py --speakers speakers.jsonl --model models/lina --output voices/

A line of the file is {"speaker", "samples": [{"audio", "text"}, …], "consent": {"who", "when", "scope"}}; a folder with
a folder a speaker does as well. The enrollment stage is the one that runs on the cluster (`serve deploy
infra/configs/serve.yaml`), else one that is started for the job. The same command again does only what is missing.
Exit codes: 0 done; 1 failed; 2 the command is wrong; 3 done, but too many speakers were rejected.
"""

import os
import sys

# jobs/ holds a file with the name of a module of the standard library: the project's folder takes its place.
if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import contextlib
import time
from typing import Any

from infra import config as configs
from pipeline.enroll_config import EnrollConfig
from pipeline.synthesize_config import DEMO_MODEL


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs.add_arguments(parser, EnrollConfig)
    try:
        config = configs.from_arguments(EnrollConfig, parser.parse_args())
    except configs.ConfigError as error:
        parser.error(str(error))
    if config.model == DEMO_MODEL and not os.path.isdir(DEMO_MODEL):
        print(
            "enroll: this installation has no embedded model; name an exported one with --model FOLDER "
            "(jobs/pretrain.py trains one, jobs/export.py makes its folder)",
            file=sys.stderr,
        )
        return 2

    from infra import cluster, tracking
    from model.codec_config import CodecError
    from model.lina_config import ModelError
    from pipeline.asr_models import TranscriptionUnavailable
    from pipeline.enrollment_app import EnrollmentError
    from pipeline.manifests.errors import ManifestError
    from pipeline.plan import PlanError

    try:
        with cluster.connect():
            return enroll(config)
    except EnrollmentError as error:
        print(f"enroll: {error}", file=sys.stderr)
        return 1
    except (
        *(CodecError, ManifestError, ModelError, PlanError, TranscriptionUnavailable),
        *(cluster.ClusterError, tracking.TrackingError),
    ) as error:
        print(f"enroll: {error}", file=sys.stderr)
        return 2


def enroll(config: EnrollConfig) -> int:
    """Enrolls a batch and reports; returns the exit code."""
    from infra import tracking
    from pipeline import enrollment

    batch = enrollment.prepare(config)
    config = batch.config
    print(
        f"enroll: {config.speakers} → {config.output}/{config.tenant}, model {batch.card.fingerprint[:12]}…", flush=True
    )
    with tracking.track(
        config.experiment,
        os.path.basename(config.output),
        config=batch.folder.settings | {"speakers": config.speakers, "output": config.output, "tenant": config.tenant},
        tags={"model": batch.card.fingerprint, "codec": batch.codec.identity.name},
        run_id=tracking.known_run(config.output),
        tracking=config.tracking,
    ) as run:
        tracking.remember_run(config.output, run)
        run.log_input(os.path.basename(config.model), batch.card.fingerprint, config.model, context="model")
        results, summary = work(batch, run)
        print(f"tracked   {run.where}")
    print(describe_summary(summary, config.output))
    if results.reject_fraction > config.max_reject_fraction:
        print(
            f"enroll: {results.reject_fraction:.1%} of the speakers were rejected, more than max_reject_fraction "
            f"({config.max_reject_fraction:.1%}); reasons in {config.output}/quarantine.jsonl",
            file=sys.stderr,
        )
        return 3
    return 0


def work(batch: Any, run: Any) -> tuple[Any, dict[str, Any]]:
    """(results, summary) of all speakers, with the report written and tracked."""
    from infra import storage
    from pipeline import enrollment_report

    results, start = enrollment_report.Results(), time.monotonic()
    tune(batch, results, run)
    if results.known == len(results.rows):
        print("enroll: nothing was missing that could be made")
    if batch.config.listen:
        from pipeline.enrollment_listening import listen

        try:
            listen(batch, results)
        except Exception as error:  # whatever it is, the voices are there and the report is due
            fault = repr(getattr(error, "cause", None) or error)  # Ray's own holds a whole traceback
            results.notes.append(f"the report has nothing to hear: saying its sentence failed with {fault[:1000]}")
            print(f"enroll: {results.notes[-1]}", file=sys.stderr)
    summary = enrollment_report.write(batch, results, time.monotonic() - start)
    run.log_metrics(enrollment_report.metrics(summary))
    for name in enrollment_report.FILES:
        run.log_artifact(storage.join(batch.config.output, name))
    return results, summary


def tune(batch: Any, results: Any, run: Any) -> None:
    """Enrolls who is missing, on the stage that runs or on one of our own."""
    from tqdm import tqdm

    from pipeline import enrollment, enrollment_app
    from pipeline.progress import pace

    config, start = batch.config, time.monotonic()
    with contextlib.ExitStack() as opened, tqdm(desc="enrolling", unit=" speakers", **pace()) as bar:

        def open_stage() -> Any:
            own = config.stage(owner=f"enroll {config.output}")
            return opened.enter_context(enrollment_app.stage(own, batch.about))

        def on_result(result: Any, known: bool) -> None:
            results.take(result, known)
            made = len(results.rows) - results.known
            rate = 3600 * made / max(time.monotonic() - start, 1e-9)
            bar.set_postfix_str(f"{rate:,.0f} voices an hour, {len(results.rejects)} rejected", refresh=False)
            bar.update(1)
            if not known and isinstance(result, dict):
                run.log_metrics({"voices_so_far": made, "voices_an_hour_so_far": rate}, step=made)
                if config.child_runs:
                    track_speaker(config, run, result["row"])

        enrollment.run(batch, open_stage, on_result)


def track_speaker(config: EnrollConfig, parent: Any, row: dict[str, Any]) -> None:
    """A run of its own for a speaker, below the batch's."""
    from infra import tracking

    if not parent.run_id:
        return
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "bytes"}
    with tracking.track(config.experiment, row["speaker"], parent=parent.run_id, tags={"ended": row["ended"]}) as run:
        run.log_metrics(numbers)
        for step, loss in row["curve"]:
            run.log_metrics({"held_out_loss": loss}, step=step)


def describe_summary(summary: dict[str, Any], output: str) -> str:
    lines = [
        f"done      {output}, report.html",
        f"speakers  {summary['speakers']:,}",
        f"voices    {summary['enrolled']:,} enrolled, {summary['known']:,} were there",
        f"speech    {summary['hours']:,.2f} h",
        f"rate      {summary['voices_an_hour']:,.0f} voices an hour",
    ]
    means = summary["means"]
    if "tuned_loss" in means:
        losses = [name for name in ("base", "continuation", "tuned") if f"{name}_loss" in means]
        shown = ", ".join(f"{means[f'{name}_loss']:.3f} {name}" for name in losses)
        lines.append(f"loss      {shown}")
    lines += [f"rejects   {summary['rejected']:,}"] + [
        f"          {n:,} {reason}" for reason, n in summary["rejects"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
