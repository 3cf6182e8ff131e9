# The usual commands; `just` alone lists them. `cargo install just` brings it.
set positional-arguments

# list the recipes
default:
    @just --list --unsorted

# the program, optimised
build:
    cargo build --locked --release

# every test that needs no data
test *args:
    cargo test --locked "$@"

# the Python package's tests, on the checkout, with the program of `just build`
test-python *args: build
    RUNNER="$PWD/target/release/runner" PYTHONPATH=python python3 -m pytest python/tests "$@"

# the wheel: the Python package with the command
wheel:
    cd python && maturin build --release --locked --out ../target/wheels

# the tests that need data; tests/it/data.rs says which variables name it
test-data *args:
    cargo test --locked -- --ignored --skip campaign:: "$@"

# clippy as CI runs it, with the device arm and without
lint:
    cargo clippy --locked --all-targets -- -D warnings
    cargo clippy --locked --all-targets --no-default-features -- -D warnings

# write the format anew
fmt:
    cargo fmt

# licences, sources and versions of every package (needs cargo-deny)
deny:
    cargo deny --locked check bans licenses sources
    cargo deny --locked --config deny.toml --manifest-path fuzz/Cargo.toml check bans licenses sources

# what must hold before a change is sent, with nothing but Rust
check: && lint test
    cargo fmt --check

# everything: real weights, engines, packages, a browser; it installs what it lacks, as root
ci:
    .ci/run

# the benchmark of products, as `just bench -- 'e4m3|fma'`; benches/README.md has its numbers
bench *args:
    cargo bench --locked --bench gemm "$@"

# how long a whole pass takes by an engine's kernels and by the project's own; benches/README.md has the numbers
bench-pass: build
    python3 benches/engine_pass.py target/release/runner --model synthetic:qwen2.5-7b --engine transformers

# what got more than 5 % slower than the last release, or than a revision: `just bench-check HEAD~20`
bench-check *args:
    python3 benches/check.py "$@"

# how fast passes and verdicts are now, beside what they were; benches/README.md has the numbers
bench-passes *args: build
    python3 benches/passes.py target/release/runner --model models/SmolLM2-135M-Instruct.Q4_1.gguf "$@"

# how long a run takes whose results are all in a shared cache; benches/README.md has the numbers
bench-cache *args: build
    python3 -m venv target/s3
    target/s3/bin/pip install --quiet --disable-pip-version-check -r tests/consumers/s3.txt
    target/s3/bin/python benches/shared_cache.py target/release/runner "$@"

# what the program prints about itself
docs: build
    target/release/runner reference > docs/reference.md
    target/release/runner reference --models > docs/models.md

# one fuzz target, some seconds (needs cargo-fuzz and a nightly compiler)
fuzz target seconds="60":
    RUNNER_CORPUS="$PWD/fuzz/corpus" cargo test --locked --test it every_seed
    cargo +nightly fuzz run {{ target }} -- -max_total_time={{ seconds }}
