# shellcheck shell=bash
# Sourced by run-optuna-local.sh and tests/run.sh, in the bundle's top folder.

# make_venv FOLDER GROUP…: a Python environment with these dependency groups of pyproject.toml.
# Does nothing where it is there already and pyproject.toml has not changed since.
make_venv() {
    local folder=$1 python=${PYTHON:-python3} groups=() group
    shift
    local stamp="$folder/installed-$*.toml"
    if cmp -s pyproject.toml "$stamp"; then
        return 0
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: $python is missing or older than Python 3.10; set PYTHON=/path/to/python3" >&2
        return 2
    fi
    for group in "$@"; do
        groups+=(--group "$group")
    done
    echo "Installing into $folder (once; torch is large: about 3 GB and 2 to 5 minutes) …"
    if [[ ! -x $folder/bin/python ]] && ! "$python" -m venv "$folder"; then
        echo "error: $python has no venv module; on Debian: apt install python3-venv" >&2
        return 2
    fi
    "$folder/bin/python" -m pip install --quiet --upgrade 'pip>=25.1' &&
        "$folder/bin/python" -m pip install --quiet "${groups[@]}" &&
        cp pyproject.toml "$stamp"
}
