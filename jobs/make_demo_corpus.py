#!/usr/bin/env python
"""Synthesises the demo corpus: multi-speaker English with exact texts, from voices that ship in packages.

    python jobs/make_demo_corpus.py                                              # 5 minutes, 16 speakers, data/demo
    ray job submit -- python jobs/make_demo_corpus.py --hours 10 --speakers 200 --output s3://bucket/demo

The same command again makes only what is missing. Exit codes: 0 done; 1 failed; 2 the command is wrong.
"""

import os
import sys

# A script's own folder comes first on sys.path, where jobs/tokenize.py would hide Python's module of that name.
if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import time

from infra import config as configs


def main() -> int:
    from pipeline.demo_corpus import DemoConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs.add_arguments(parser, DemoConfig)
    try:
        config = configs.from_arguments(DemoConfig, parser.parse_args())
    except configs.ConfigError as error:
        parser.error(str(error))
    return run(config)


def run(config) -> int:
    from infra import cluster
    from pipeline.demo_corpus import claim, make
    from pipeline.demo_voices import DemoError

    try:
        claim(config)
        with cluster.connect(), _Progress() as progress:
            totals = make(config, progress)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{totals['utterances']} utterances, {totals['seconds'] / 60:.1f} minutes, {len(totals['speakers'])} speakers "
        f"in {config.output}"
    )
    return 0


class _Progress:
    """A bar on a terminal, and a line every quarter of a minute where there is none."""

    def __enter__(self):
        from tqdm import tqdm

        interval = 0.5 if sys.stderr.isatty() else 15.0
        self.bar = tqdm(unit="block", desc="demo corpus", mininterval=interval, smoothing=0.0)
        self.started, self.before = time.monotonic(), None
        return self

    def __call__(self, done: int, total: int, seconds: float) -> None:
        if self.before is None:  # What an earlier run made must not count as this one's speed.
            self.before = seconds
            self.bar.initial = done
        rate = (seconds - self.before) / max(1e-9, time.monotonic() - self.started)
        self.bar.total = total
        self.bar.set_postfix_str(f"{seconds / 3600:.3f} h, {rate:.1f} x real time", refresh=False)
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        self.bar.close()


if __name__ == "__main__":
    sys.exit(main())
