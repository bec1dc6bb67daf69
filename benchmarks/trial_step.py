"""A whole trial step, observation included, against sentence-transformers' SparseEncoderTrainer run for real.

Same backbone (six layers of width 256, 30,522 terms, random weights), pairs, recipe (in-batch negatives, FLOPS on
both sides, AdamW, warmup, clipping) and batch of 16. The peers step inside their own `train()`, turn by turn with
headscale; "drop-in" is the same trainer on an encoder that pools through headscale's head.

Example:
    python benchmarks/trial_step.py --threads 2 --json benchmarks/results/trial_step.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import _harness as harness

VOCAB, WIDTH, LAYERS, BATCH = 30_522, 256, 6, 16
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Words of a query and of a document: both full at 256 tokens, or about as long as those of MS MARCO.
LENGTHS = {"256/256": ((254, 254), (254, 254)), "short": ((4, 12), (30, 110))}
NAMES = ("headscale", "sentence-transformers", "drop-in")
COLUMNS = ["lengths", "threads", "headscale s", "spread s", "sentence-transformers s", "drop-in s", "speed", "speed of"
           " drop-in", "MB", "sentence-transformers MB", "drop-in MB", "memory", "loss difference"]  # fmt: skip


@dataclass(frozen=True)
class Pair:
    query: str
    document: str


def make_pairs(lengths: str, count: int, seed: int = 0) -> list[Pair]:
    source = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(f"w{source.randrange(VOCAB - len(SPECIAL))}" for _ in range(source.randint(low, high)))

    return [Pair(*(text(*side) for side in LENGTHS[lengths])) for _ in range(count)]


def write_backbone(folder: Path, dropout: float, *, width: int = WIDTH, layers: int = LAYERS) -> None:
    """A BERT with random weights and a WordPiece tokenizer whose words are its terms."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    torch.manual_seed(0)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *(f"w{i}" for i in range(VOCAB - len(SPECIAL)))]))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=512).save_pretrained(folder)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
        intermediate_size=4 * width, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)


class Headscale:
    """One step at a time of headscale's trainer, every number of it observed."""

    def __init__(self, folder: Path, pairs: list[Pair], steps: int) -> None:
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        from headscale.recipes import recipe
        from headscale.trainer import Trainer

        config = recipe("st-mnrl").replace(steps=steps, negatives=0, precision="fp32", batch_size=BATCH, device="cpu")
        model = AutoModelForMaskedLM.from_pretrained(folder)
        self.trainer = Trainer(model, AutoTokenizer.from_pretrained(folder), config)
        self.pairs = pairs

    def step(self) -> float:
        """Train on the next pairs; gives the loss."""
        from headscale.batches import Batch

        first = self.trainer.steps_done * BATCH
        part = self.pairs[first : first + BATCH]
        return self.trainer.step([Batch(tuple(p.query for p in part), tuple(p.document for p in part), None)]).loss

    def close(self) -> None: ...


class Peer:
    """SparseEncoderTrainer, held at the end of every step until its next turn."""

    def __init__(self, folder: Path, pairs: list[Pair], steps: int, *, drop_in: bool = False) -> None:
        self.steps, self.losses, self.stopped = steps, [], False
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self.trainer = self._trainer(folder, pairs, drop_in)
        self._thread = threading.Thread(target=self._train, daemon=True)

    def _trainer(self, folder: Path, pairs: list[Pair], drop_in: bool) -> Any:
        from datasets import Dataset
        from sentence_transformers import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
        from sentence_transformers.base.sampler import DefaultBatchSampler
        from sentence_transformers.sparse_encoder.callbacks import SpladeRegularizerWeightSchedulerCallback
        from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss
        from torch.utils.data import SequentialSampler

        encoder = SparseEncoder(str(folder), device="cpu")
        encoder.max_seq_length = 256
        if drop_in:
            from headscale.interop.sparse_encoder import use_pooled_head

            use_pooled_head(encoder)
        loss = SpladeLoss(
            encoder, SparseMultipleNegativesRankingLoss(encoder),
            document_regularizer_weight=1e-3, query_regularizer_weight=5e-5,
        )  # fmt: skip

        def in_order(dataset: Any, *, generator: Any, **options: Any) -> Any:
            return DefaultBatchSampler(SequentialSampler(dataset), generator=generator, **options)

        arguments = SparseEncoderTrainingArguments(
            str(folder / "out"), max_steps=self.steps, per_device_train_batch_size=BATCH, learning_rate=2e-5,
            warmup_steps=-(-self.steps // 10), use_cpu=True, batch_sampler=in_order, save_strategy="no",
            report_to="none", disable_tqdm=True, logging_steps=500,
        )  # fmt: skip
        columns = {"query": [p.query for p in pairs], "document": [p.document for p in pairs]}
        trainer = SparseEncoderTrainer(
            encoder, arguments, Dataset.from_dict(columns), loss=loss,
            callbacks=[_turns(self), SpladeRegularizerWeightSchedulerCallback(loss)],
        )  # fmt: skip
        self._note_losses(trainer)
        return trainer

    def _note_losses(self, trainer: Any) -> None:
        compute = trainer.compute_loss

        def noted(*arguments: Any, **named: Any) -> Any:
            loss = compute(*arguments, **named)
            self.losses.append(float(loss.detach()))
            return loss

        trainer.compute_loss = noted

    def _train(self) -> None:
        self._go.acquire()
        try:
            self.trainer.train()
        finally:
            self.stopped = True
            self._done.release()

    def hand_over(self) -> None:
        """Called by the trainer at the end of a step: let the others have the machine."""
        self._done.release()
        self._go.acquire()

    def step(self) -> float:
        """Let the trainer go on to the end of its next step; gives the loss."""
        if self.stopped:
            raise RuntimeError("the trainer has ended")
        if not self._thread.is_alive():
            self._thread.start()
        self._go.release()
        self._done.acquire()
        return self.losses[-1]

    def close(self) -> None:
        """Let the trainer end."""
        self.trainer.args.max_steps = 0
        self.trainer.control.should_training_stop = True
        self._go.release()
        self._thread.join()


def _turns(peer: Peer) -> Any:
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            peer.hand_over()
            control.should_training_stop = control.should_training_stop or peer.trainer.args.max_steps == 0

    return Turns()


def build(name: str, folder: Path, lengths: str, steps: int) -> Headscale | Peer:
    pairs = make_pairs(lengths, steps * BATCH)
    if name == "headscale":
        return Headscale(folder, pairs, steps)
    return Peer(folder, pairs, steps, drop_in=name == "drop-in")


def timed_row(lengths: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step of every contender, and the ratios within a round."""
    steps = (options.rounds + 1) * options.steps + 1
    with tempfile.TemporaryDirectory() as name:
        write_backbone(Path(name), 0.1)
        contenders = {one: build(one, Path(name), lengths, steps) for one in options.contender or NAMES}

        def several(one: Headscale | Peer) -> None:
            for _ in range(options.steps):
                one.step()

        calls: dict[str, Callable[[], object]] = {k: partial(several, v) for k, v in contenders.items()}
        clock = time.process_time if options.cpu_time else time.perf_counter
        times = harness.interleaved(calls, rounds=options.rounds, clock=clock)
        for one in contenders.values():
            one.close()
    return _row(lengths, options, times)


def _row(lengths: str, options: argparse.Namespace, times: dict[str, harness.Timing]) -> dict[str, Any]:
    import torch

    row: dict[str, Any] = {"lengths": lengths, "threads": torch.get_num_threads()}
    row |= {f"{name} s": timing.median / options.steps for name, timing in times.items()}
    ours = times["headscale"]
    row["spread s"] = f"{ours.low / options.steps:.2f}-{ours.high / options.steps:.2f}"
    for key, name in (("speed", "headscale"), ("speed of drop-in", "drop-in")):
        if name in times and NAMES[1] in times:
            row[key] = times[NAMES[1]].over(times[name])
    return row | {"steps a round": options.steps, "times": [timing.to_dict() for timing in times.values()]}


def memory_row(lengths: str) -> dict[str, Any]:
    """Peak beyond the loaded model over two steps, each contender in a process of its own."""
    found = {}
    for name in NAMES:
        got = harness.in_fresh_process(__file__, "--memory-of", json.dumps([name, lengths]))
        found[name] = got.get("bytes")
    ours, peer = found["headscale"], found["sentence-transformers"]
    row = {f"{name} MB": size and size / 2**20 for name, size in found.items()}
    row["MB"] = row.pop("headscale MB")
    return row | {"memory": ours / peer if ours and peer else None}


def measure_memory(name: str, lengths: str) -> dict[str, int]:
    """In the fresh process: libraries and model first, then what two steps add."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_backbone(Path(folder), 0.1)
        build(name, Path(folder), "short", 3)  # every import, and every lazy one
        one = build(name, Path(folder), lengths, 3)
        with harness.PeakMemory() as peak:
            for _ in range(2):  # the second holds what the optimizer took in the first
                one.step()
        one.close()
    return {"bytes": peak.bytes}


def agreement() -> float:
    """Largest relative difference of the losses over five steps without dropout: the same training, then."""
    with tempfile.TemporaryDirectory() as folder:
        write_backbone(Path(folder), 0.0)
        contenders = [build(name, Path(folder), "short", 6) for name in NAMES]
        losses = [[one.step() for one in contenders] for _ in range(5)]
        for one in contenders:
            one.close()
    return max(abs(value / row[1] - 1) for row in losses for value in row)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", action="append", choices=list(LENGTHS), help="may be repeated")
    parser.add_argument("--contender", action="append", choices=NAMES, help="may be repeated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="steps in a round")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds: for a busy machine")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.memory_of:
        print(json.dumps(measure_memory(*json.loads(options.memory_of))))
        return
    import torch

    torch.set_num_threads(options.threads)
    rows = []
    for lengths in options.lengths or list(LENGTHS):
        row = timed_row(lengths, options)
        rows.append(row if options.no_memory else row | memory_row(lengths))
    difference = None if options.contender else agreement()
    print(harness.markdown(rows, [c for c in COLUMNS if any(c in row for row in rows)]))
    print(f"\nlargest difference of a loss, without dropout: {difference}\n{harness.machine_line()}")
    if options.json:
        clock = f"{'CPU' if options.cpu_time else 'wall'} seconds, {options.threads} threads"
        harness.save_json(options.json, "trial_step", rows, clock=clock, loss_difference=difference)


if __name__ == "__main__":
    main()
