#!/usr/bin/env python
"""Says a text, or every line of a script, in the voices that they ask for.

    python jobs/synthesize.py --text "Good morning." --voice voices/shared/ann.safetensors --out morning.wav
    ray job submit -- python jobs/synthesize.py --script lines.jsonl --voices voices/shared --output wavs/

A script is JSONL with id, voice and text. The same command again makes only what is missing. Files are WAV, FLAC or
Opus and say of themselves that they are synthetic, by which model, and in whose voice.
Exit codes: 0 done; 1 failed; 2 the command is wrong; 3 done, but too much was rejected or failed every attempt.
"""

import os
import sys

# jobs/ holds a file with the name of a module of the standard library: the project's folder takes its place.
if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import time
from typing import Any

from infra import config as configs
from pipeline.synthesize_config import DEMO_MODEL, SynthesizeConfig


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs.add_arguments(parser, SynthesizeConfig)
    try:
        config = configs.from_arguments(SynthesizeConfig, parser.parse_args())
    except configs.ConfigError as error:
        parser.error(str(error))
    if config.model == DEMO_MODEL and not os.path.isdir(DEMO_MODEL):
        print(
            "synthesize: this installation has no embedded model; name an exported one with --model FOLDER "
            "(jobs/pretrain.py trains one, jobs/export.py makes its folder)",
            file=sys.stderr,
        )
        return 2

    from infra import cluster
    from infra.tracking import TrackingError
    from model.codec_config import CodecError
    from model.lina_config import ModelError
    from pipeline.plan import PlanError
    from pipeline.scripts import ScriptError
    from pipeline.speech_files import SpeechFileError
    from pipeline.speech_stage import SynthesisError
    from pipeline.utterances import Unusable

    try:
        if config.text is not None:
            return say(config)
        with cluster.connect():
            return perform(config)
    except SynthesisError as error:
        print(f"synthesize: {error}", file=sys.stderr)
        return 1
    except (
        *(CodecError, ModelError, PlanError, ScriptError, SpeechFileError, Unusable),
        *(cluster.ClusterError, TrackingError),
    ) as error:
        print(f"synthesize: {error}", file=sys.stderr)
        return 2


def say(config: SynthesizeConfig) -> int:
    """One text into one file; returns the exit code."""
    import dataclasses

    from tqdm import tqdm

    from infra import devices, storage
    from pipeline.bulk_synthesis import codec_of
    from pipeline.progress import pace
    from pipeline.speaking_voices import read_voice
    from pipeline.speech_files import encode, ending
    from pipeline.speech_lines import Line
    from pipeline.speech_stage import SynthesisError, describe, provenance_of, synthesizer_of
    from pipeline.synthesis import read_model

    form, device = ending(config.out), devices.of_process(config.device)
    files = read_model(config.model)
    synthesizer = synthesizer_of(dataclasses.replace(config, device=device), files, codec_of(config, files))
    voice = read_voice(config.voice, synthesizer.card) if config.voice else None
    synthesizer.submit("text", Line(config.text, voice, config.seed))
    check_writable(config.out)
    start, done = time.monotonic(), []
    with tqdm(desc="sentences", total=synthesizer.pieces_left, **pace()) as bar:
        while not done:
            done = synthesizer.step()
            bar.update(bar.total - synthesizer.pieces_left - bar.n)
    ((_, spoken),) = done
    report = describe(spoken)
    details = {"seed": config.seed, "report": report}
    provenance = provenance_of(synthesizer.card.fingerprint, voice, config.text, details)
    content = encode(spoken.samples, spoken.rate, provenance, form)
    try:
        storage.write_bytes(config.out, content)
    except OSError as error:
        raise SynthesisError(f"{config.out} cannot be written: {error}") from None
    took = time.monotonic() - start
    print(f"spoken    {config.out}: {spoken.seconds:.2f} s, {spoken.seconds / max(took, 1e-9):.2f} × real time")
    print(f"sentences {report['pieces']}, {report['attempts']} attempts, faults: {', '.join(spoken.faults) or 'none'}")
    return 3 if spoken.faults and config.max_reject_fraction < 1 else 0


def check_writable(out: str) -> None:
    """Raises SpeechFileError where nothing can be written at a local path: known before anything is said."""
    import tempfile

    from infra import storage
    from pipeline.speech_files import SpeechFileError

    if not storage.is_local(out):
        return
    path = storage.absolute(out)
    folder = os.path.dirname(path)
    try:
        if os.path.isdir(path):
            raise IsADirectoryError("it is a folder")
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SpeechFileError(f"{out} cannot be written: {error}") from None


def perform(config: SynthesizeConfig) -> int:
    """A script into a folder; returns the exit code."""
    from infra import tracking
    from pipeline import bulk_synthesis

    bulk = bulk_synthesis.plan(config)
    config = bulk.config
    with tracking.track(
        config.experiment,
        os.path.basename(config.output),
        config=bulk.settings | {"script": config.script, "output": config.output, "voices": config.voices},
        tags={"model": bulk.settings["model"], "codec": bulk.codec.identity.name},
        run_id=tracking.known_run(config.output),
        tracking=config.tracking,
    ) as run:
        tracking.remember_run(config.output, run)
        run.log_input(os.path.basename(config.model), bulk.settings["model"], config.model, context="model")
        summary = work(bulk, run)
        print(describe_summary(summary, config.output))
        print(f"tracked   {run.where}")
    if (fraction := bulk_synthesis.bad_fraction(summary)) > config.max_reject_fraction:
        print(
            f"synthesize: {fraction:.1%} of the lines were rejected or failed every attempt, more than "
            f"max_reject_fraction ({config.max_reject_fraction:.1%}); see manifest.jsonl and quarantine.jsonl",
            file=sys.stderr,
        )
        return 3
    return 0


def work(bulk: Any, run: Any) -> dict[str, Any]:
    """Says what is missing; returns the summary of all of the script, which is tracked, too."""
    from tqdm import tqdm

    from infra import storage
    from pipeline import bulk_synthesis
    from pipeline.progress import pace

    total, missing = bulk.survey.lines, bulk.lines(bulk.missing())
    print(
        f"synthesize: {total:,} lines, {missing:,} to be said → {bulk.config.output} on {bulk.config.device}",
        flush=True,
    )
    start, said, made, bad = time.monotonic(), 0, 0.0, 0
    with tqdm(desc="synthesizing", unit=" lines", total=total, initial=total - missing, **pace()) as bar:

        def on_rows(rows: list[dict[str, Any]]) -> None:
            nonlocal said, made, bad
            said += len(rows)
            made += sum(row.get("seconds", 0.0) for row in rows)
            bad += sum("reason" in row or bool(row["faults"]) for row in rows)
            rate = made / max(time.monotonic() - start, 1e-9)
            bar.set_postfix_str(f"{made / 60:,.1f} min, {rate:.1f} × real time, {bad} bad", refresh=False)
            bar.update(len(rows))
            run.log_metrics({"lines_so_far": said, "real_time_factor_so_far": rate, "bad_so_far": bad}, step=said)

        bulk_synthesis.run(bulk, on_rows)
    summary = bulk_synthesis.finish(bulk)
    faults = {f"faults.{name}": count for name, count in summary["faults"].items()}
    rejects = {f"rejects.{name}": count for name, count in summary["rejects"].items()}
    totals = {name: value for name, value in summary.items() if isinstance(value, int | float)}
    run.log_metrics(totals | faults | rejects)
    run.log_artifact(storage.join(bulk.config.output, "summary.json"))
    return summary


def describe_summary(summary: dict[str, Any], output: str) -> str:
    lines = [
        f"done      {output}",
        f"lines     {summary['spoken']:,} of {summary['lines']:,}, {summary['seconds'] / 60:,.1f} minutes of speech",
        f"attempts  {summary['attempts']:,} at {summary['pieces']:,} sentences",
        f"failed    {summary['failed']:,} lines after all attempts",
        *(f"          {count:,} {fault}" for fault, count in summary["faults"].items()),
        f"rejects   {sum(summary['rejects'].values()):,}",
        *(f"          {count:,} {reason}" for reason, count in summary["rejects"].items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
