"""Tunes the peak learning rate of every optimizer alike, and writes training/compare/tuned.json.

    python benchmarks/tune.py                 # all, more than an hour on 2 cores
    python benchmarks/tune.py --only lion sgd # these again, the others kept
    python benchmarks/tune.py --keep          # only trials that the table does not hold yet

Every optimizer gets the same number of trials: the race's model, text, batch, warm-up, cosine decay
and weight decay (the same share of every matrix a step), and TRIALS learning rates a factor of two
apart, centred on CENTRES, then two more, a factor of the square root of two from the best. Other
hyperparameters are HYPERPARAMETERS, chosen beforehand and not tuned. The trials use another seed
than the race. The best final held-out loss wins; a best rate at the edge of its grid is reported, so
that the centre can be moved and the grid run again.
"""

import argparse
import dataclasses
import datetime
import json
import math
import tempfile
from pathlib import Path

import jax
from ravine.optimizers import OptimizerConfig
from ravine.training.compare.entrants import Entrant
from ravine.training.config import RunConfig
from ravine.training.data.corpus import load_corpus
from ravine.training.run.outcome import Outcome
from ravine.training.train import train

TABLE = Path(__file__).parents[1] / "training" / "compare" / "tuned.json"
TRIALS = 5
STEPS, EVAL_BATCHES = 300, 16  # more than in a race
CENTRES = {
    "adamw": 0.004,
    "lion": 0.0008,
    "muon": 0.02,
    "shampoo": 0.004,
    "soap": 0.008,
    "soap_muon": 0.01,
    "sgd": 0.5,
    "rmsprop": 0.002,
    "adagrad": 0.04,
    "adam": 0.004,
}
HYPERPARAMETERS = {
    "muon": {"scale": "moonlight"},
    "shampoo": {"b2": 0.95, "refresh": {"every": 5}, "exponent": -0.5},
    "soap": {"refresh": {"every": 5}},
    "soap_muon": {"b1": 0.9, "refresh": {"every": 5}},
    "sgd": {"momentum": 0.9},
    "rmsprop": {"b2": 0.95},
    "adam": {"b2": 0.95},
    "adamw": {"b2": 0.95},
}


def tune(name: str, run: RunConfig, known: dict[float, float]) -> dict:
    corpus = load_corpus(run.data)
    run = dataclasses.replace(
        run, model=dataclasses.replace(run.model, vocabulary=corpus.vocabulary)
    )
    config = OptimizerConfig(name, HYPERPARAMETERS.get(name, {}))
    losses: dict[float, float] = {}

    def attempt(rate: float) -> None:
        outcome = Outcome(name, rate)
        if rate in known:
            losses[rate] = known[rate]
            return
        with tempfile.TemporaryDirectory() as folder:
            train(run, Entrant(config, rate).build(run), corpus, outcome, Path(folder))
        losses[rate] = outcome.final_loss
        print(f"{name:<10} {rate:<10.3g} {outcome.status:<10} {outcome.final_loss:.4f}", flush=True)
        jax.clear_caches()

    for index in range(TRIALS):
        attempt(CENTRES[name] * 2.0 ** (index - TRIALS // 2))
    coarse = min(losses, key=losses.__getitem__)
    for factor in (2**-0.5, 2**0.5):
        attempt(float(f"{coarse * factor:.3g}"))
    best = min(losses, key=losses.__getitem__)
    if best in (min(losses), max(losses)):
        print(f"{name}: the best rate {best:.3g} lies at the edge of its grid; move its centre")
    return {
        "learning_rate": best,
        "hyperparameters": dict(config.hyperparameters),
        "trials": [
            {"learning_rate": rate, "heldout_loss": round(loss, 4) if math.isfinite(loss) else None}
            for rate, loss in sorted(losses.items())
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CENTRES), default=list(CENTRES))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the trials already in the table")
    arguments = parser.parse_args()
    run = RunConfig(seed=arguments.seed, steps=STEPS, eval_every=STEPS, eval_batches=EVAL_BATCHES)
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    for name in arguments.only:
        trials = table["optimizers"].get(name, {}).get("trials", []) if arguments.keep else []
        tuned = tune(name, run, {t["learning_rate"]: t["heldout_loss"] or math.inf for t in trials})
        table["optimizers"][name] = {
            **tuned,
            "date": datetime.date.today().isoformat(),
            "jax": jax.__version__,
        }
        table["how"] = (
            f"benchmarks/tune.py: {TRIALS} learning rates a factor of two apart for every "
            f"optimizer and two around the best, {run.steps} steps of the race's task with seed "
            f"{arguments.seed}, best final held-out loss; other hyperparameters fixed beforehand."
        )
        TABLE.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
