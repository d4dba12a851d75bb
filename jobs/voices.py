#!/usr/bin/env python
"""Shows and manages voice files.

    python jobs/voices.py list --voices voices/
    python jobs/voices.py show ada --voices voices/
    python jobs/voices.py export ada --voices voices/ --out ada.safetensors
    python jobs/voices.py delete ada --voices voices/ --yes

A voice is named by its speaker, or tenant/speaker. Folders and files are paths or fsspec URLs.
Exit codes: 0 done; 1 there is such a voice, but it is damaged or made to do harm; 2 the command is wrong.
"""

import os
import sys

# jobs/ holds a file with the name of a module of the standard library: the project's folder takes its place.
if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
from typing import Any

from pipeline.enroll_config import SHARED

DEFAULT = "out/voices"


def main() -> int:
    options = parsed()
    from infra import storage
    from model.lina_config import ModelError
    from model.voice_file import VoiceError
    from pipeline.voice_files import NoSuchVoice

    options.voices = storage.absolute(options.voices)
    try:
        return options.act(options)
    except VoiceError as error:
        print(f"voices: {error}", file=sys.stderr)
        return 2 if isinstance(error, NoSuchVoice) else 1
    except BrokenPipeError:
        raise
    except (ModelError, OSError) as error:
        print(f"voices: {error}", file=sys.stderr)
        return 2


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="list|show|export|delete")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--voices", default=DEFAULT, help=f"folder of voices (default: {DEFAULT})")
    one = argparse.ArgumentParser(add_help=False, parents=[shared])
    one.add_argument("voice", help="speaker, or tenant/speaker")
    one.add_argument("--tenant", default=SHARED, help=f"whose voice (default: {SHARED})")

    listed = commands.add_parser("list", parents=[shared], help="all voices, a line each")
    listed.add_argument("--tenant", help="only this one's")
    listed.add_argument("--json", action="store_true", help="a JSON object a line")
    listed.set_defaults(act=show_all)
    commands.add_parser("show", parents=[one], help="a voice's record, as JSON").set_defaults(act=show)
    exported = commands.add_parser("export", parents=[one], help="check a voice file wholly and copy it")
    exported.add_argument("--out", required=True, help="where to; a path or URL")
    exported.add_argument("--model", help="folder of the model that it must belong to")
    exported.set_defaults(act=export)
    deleted = commands.add_parser("delete", parents=[one], help="remove a voice for good")
    deleted.add_argument("--yes", action="store_true", help="do not ask")
    deleted.set_defaults(act=delete)
    return parser.parse_args()


def show_all(options: argparse.Namespace) -> int:
    from model.voice_file import VoiceError
    from pipeline.voice_files import found

    code = 0
    if not options.json:
        print(f"{'voice':32} {'speech':>8} {'steps':>5} {'loss':>7} {'model':12}  consent")
    for file in found(options.voices, options.tenant):
        try:
            record = file.record()
        except VoiceError as error:
            print(f"voices: {error}", file=sys.stderr)
            code = 1
            continue
        print(json.dumps({"tenant": file.tenant, **record}) if options.json else line(file.name, record))
    return code


def line(name: str, record: dict[str, Any]) -> str:
    """A voice as `list` shows it; what a file says of itself cannot steer the terminal."""
    training, consent = record["training"], record["consent"]
    seconds, steps, loss = (training.get(field) for field in ("data_seconds", "best_step", "tuned_loss"))
    shown = [
        f"{name:32}",
        f"{seconds:7.1f}s" if isinstance(seconds, float) else f"{'–':>8}",
        f"{steps:5}" if isinstance(steps, int) else f"{'–':>5}",
        f"{loss:7.3f}" if isinstance(loss, float) else f"{'–':>7}",
        f"{record['model'][:12]:12} ",
        f"{consent['who']}, {consent['when']}",
    ]
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in " ".join(shown))


def show(options: argparse.Namespace) -> int:
    from pipeline.voice_files import named

    file = named(options.voices, options.voice, options.tenant)
    _, voice = file.content()
    sizes = {name: list(values.shape) for name, values in sorted(voice.factors.items())}
    print(json.dumps({"file": file.url, **file.record(), "factors": sizes}, indent=2, ensure_ascii=False))
    return 0


def export(options: argparse.Namespace) -> int:
    from infra import storage
    from model.checkpoint import CONFIG_FILE, read_card
    from model.lina_config import ModelError
    from model.voice_file import unpack
    from pipeline.voice_files import named

    file = named(options.voices, options.voice, options.tenant)
    content, _ = file.content()
    if options.model:
        try:
            card = read_card(storage.read_bytes(storage.join(options.model, CONFIG_FILE)))
        except (ModelError, OSError, ValueError, ImportError) as error:
            raise ModelError(f"--model {options.model} is no model: {CONFIG_FILE} cannot be read ({error})") from None
        unpack(content, card.sizes, card.fingerprint)
    try:
        storage.write_bytes(options.out, content)
    except (OSError, ValueError, ImportError) as error:
        raise OSError(f"--out {options.out} cannot be written ({error})") from None
    print(f"exported  {file.name} → {options.out}, {len(content):,} bytes")
    return 0


def delete(options: argparse.Namespace) -> int:
    from pipeline.voice_files import named

    file = named(options.voices, options.voice, options.tenant)
    if not options.yes:
        if not sys.stdin.isatty():
            print("voices: nobody can be asked here: confirm with --yes", file=sys.stderr)
            return 2
        if input(f"delete {file.url} for good? [y/N] ").strip().lower() != "y":
            return 0
    file.delete()
    print(f"deleted   {file.name}")
    return 0


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the list, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
