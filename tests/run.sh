#!/usr/bin/env bash
# All checks of the project: the linters, then the tests.
#
#   bash tests/run.sh                    makes .venv if need be; the newest versions
#   bash tests/run.sh floor              makes .venv-floor: the versions of Turpan's image
#   bash tests/run.sh cluster            as root: a real Slurm and Apptainer (tests/cluster)
#   bash tests/run.sh gpu                what needs a GPU (tests/gpu), with both; 25 minutes at most
#   bash tests/run.sh new -k worker      what comes after the first word goes to pytest
#
# You should see "All checks passed!" of ruff, "Success" of mypy, and pytest's line "N passed"; of
# gpu a table, which is also in tests/benchmarks/gpu-figures.txt (without a GPU: one line, status 0).
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source code_and_slurm-scripts/hpo/job/venv.sh

# What depends on the versions of Python, torch or the packages; all else is the same with both.
of_versions=(tests/test_{capture,checkpoint,ddp,gpu,huggingface,optuna_llm,optuna_mnist}.py
    tests/test_{optuna_t5,plain_training,report,saving,script,settings,space,sqlite_storage,training,worker}.py
    tests/test_check_script.py::test_the_example_passes)
# Four files beside each other, also on two cores: most tests wait for processes.  In the order of
# their names, for the long ones are not those with the most tests.
parallel=(--numprocesses=4 --dist=loadfile --no-loadscope-reorder)
environment=${1:-new}
shift || true
environments=("$environment")
case $environment in
    new) tests=("${parallel[@]}" tests --ignore=tests/cluster --ignore=tests/gpu) ;;
    floor) tests=("${parallel[@]}" "${of_versions[@]}") ;;
    cluster) tests=(tests/cluster) ;;
    gpu)
        if ! nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then
            echo "no GPU here: nothing of tests/gpu was run"
            exit 0
        fi
        environments=(new floor) tests=(tests/gpu)
        rm -f tests/benchmarks/gpu-figures.txt
        ;;
    *)
        echo "usage: bash tests/run.sh [new|floor|cluster|gpu] [arguments of pytest]" >&2
        exit 2
        ;;
esac

unset PYTHONDONTWRITEBYTECODE # or each of a thousand processes compiles the bundle anew
status=0
for each in "${environments[@]}"; do
    venv=.venv group=run
    if [[ $each == floor ]]; then
        venv=.venv-floor group=floor
    fi
    make_venv "$venv" "$group"
    make_venv "$venv" test
    bin=$PWD/$venv/bin
    if [[ $environment == new ]]; then # the linters see the same files in both
        # Not by git: the tests also run in an unpacked archive.
        mapfile -t shell_files < <(find .ci/run code_and_slurm-scripts tests -type f \
            \( -name '*.sh' -o -name run \) -not -path '*/.*/*.sh')
        "$bin/ruff" check .
        "$bin/ruff" format --check .
        "$bin/mypy" --python-executable "$bin/python"
        (cd code_and_slurm-scripts && "$bin/lint-imports" --no-cache ../pyproject.toml)
        "$bin/shellcheck" "${shell_files[@]}"
        "$bin/shfmt" --indent 4 --case-indent --diff "${shell_files[@]}"
    fi
    # One thread per process: the tests start several workers at once.
    OMP_NUM_THREADS=1 "$bin/python" -m pytest "${tests[@]}" "$@" || status=$?
done
exit "$status"
