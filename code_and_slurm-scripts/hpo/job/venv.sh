# shellcheck shell=bash
# Sourced by run-optuna-local.sh and tests/run.sh, in the bundle's top folder.

# make_venv FOLDER GROUP: a Python environment with one dependency group of pyproject.toml.
# Does nothing where that is installed already and pyproject.toml has not changed since.
make_venv() {
    local folder=$1 group=$2 python=${PYTHON:-python3}
    local stamp=$folder/installed-$group.toml
    if cmp -s pyproject.toml "$stamp"; then
        return 0
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: $python is missing or older than Python 3.10; set PYTHON=/path/to/python3" >&2
        return 2
    fi
    echo "Installing the group '$group' of pyproject.toml into $folder (torch is large: ~3 GB) …"
    if [[ ! -x $folder/bin/python ]] && ! "$python" -m venv "$folder"; then
        echo "error: $python cannot make a venv; on Debian: apt install python3-venv" >&2
        return 2
    fi
    "$folder/bin/python" -m pip install --quiet --upgrade 'pip>=25.1' &&
        "$folder/bin/python" -m pip install --quiet --group "$group" &&
        cp pyproject.toml "$stamp"
}
