"""Saves small random models with passes of transformers in f64: what a reference must give.

    pip install torch "transformers>=5" safetensors
    python scripts/golden_passes.py --out golden --count 77
    RUNNER_GOLDEN_PASSES=$PWD/golden cargo test --test it -- --ignored the_reference_is_transformers

Each folder has a model as transformers saves it, and `golden.safetensors`: token ids, logits and hidden states
of an eager pass. Architectures take turns; shapes and settings follow from the seed.
"""

import argparse
import os
import random
import sys

sys.path.insert(0, os.path.dirname(__file__))

import clean_passes as passes

try:
    import torch
    from safetensors.torch import save_file
except ImportError as error:
    sys.exit(f'{error}: pip install torch "transformers>=5" safetensors')


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, help="a folder for the models")
    parser.add_argument("--count", type=int, default=22)
    parser.add_argument("--seed", type=int, default=1, help="of the first pass; the next ones count up")
    options = parser.parse_args()
    names = sorted(passes.CONFIGS | passes.OTHERS)
    for seed in range(options.seed, options.seed + options.count):
        case = draw(random.Random(seed), names[seed % len(names)])
        try:
            model = passes.made(seed, case).double().eval()
        except ValueError as error:
            print(f"{seed}: transformers does not make it: {error}")
            continue
        record(os.path.join(options.out, str(seed)), model, case, random.Random(seed))
        print(f"{seed}: {case}", flush=True)


def draw(dice, kind):
    """A small shape, and settings that the architecture has."""
    case = passes.draw(dice)
    head, keys = dice.choice([16, 32, 48]), dice.choice([1, 2])
    heads = keys * dice.choice([1, 2, 3])
    case |= {
        "length": dice.randint(6, 40),
        "head": head,
        "heads": heads,
        "key_heads": keys,
        "hidden": heads * (head if dice.random() < 0.5 else 16),
        "ffn": 16 * dice.randint(2, 10),
        "layers": dice.randint(1, 4),
        "vocabulary": dice.choice([100, 128, 200]),
    }
    passes.add_settings(dice, [kind], case)
    case["attention"] = "eager"
    if kind == "phi3" and dice.random() < 0.6:
        pairs = int(case["head"] * case["rope"]["partial_rotary_factor"]) // 2
        factors = lambda most: [round(1 + dice.random() * most, 3) for _ in range(pairs)]
        case["rope"] |= {"rope_type": "longrope", "short_factor": factors(3), "long_factor": factors(30)}
        case["settings"]["original_max_position_embeddings"] = dice.choice([64, 1024])
    return case


def record(folder, model, case, dice):
    tokens = [dice.randrange(case["vocabulary"]) for _ in range(case["length"])]
    with torch.inference_mode():
        result = model(input_ids=torch.tensor([tokens]), use_cache=False, output_hidden_states=True)
    kept = {"ids": torch.tensor(tokens, dtype=torch.int32), "logits": result.logits[0].clone()}
    kept |= {f"hidden.{number}": state[0].clone() for number, state in enumerate(result.hidden_states)}
    model.float().save_pretrained(folder)
    save_file(kept, os.path.join(folder, "golden.safetensors"))


if __name__ == "__main__":
    main()
