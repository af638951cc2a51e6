# shellcheck shell=bash
# Sourced by run-optuna-local.sh and tests/run.sh, in the bundle's top folder.

# make_venv FOLDER GROUP: a Python environment with one dependency group of pyproject.toml.
# Does nothing where that is installed already and pyproject.toml has not changed since.  What was
# interrupted, at any moment, the next call mends.
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
    echo "Installing the group '$group' of pyproject.toml into $folder, once."
    echo "With PyTorch that is about 3 GB to download and 6 GB on the disk, where" \
        "$(df --human-readable --output=avail . | tail -n 1 | tr -d ' ') are free; minutes."
    make_pip "$folder" "$python" || return
    python=$folder/bin/python
    find_packages "$python" || return
    "$python" -m pip install --quiet --upgrade 'pip>=25.1' || return # it knows dependency groups
    without_gpu "$python" "$group"
    "$python" -m pip install --group "$group" && cp pyproject.toml "$stamp"
}

# make_pip FOLDER PYTHON: a venv with a pip that runs, whatever is there of one.
make_pip() {
    local folder=$1 python=$2 said
    has_pip "$folder" && return
    if [[ -x $folder/bin/python ]]; then # killed before pip was there, or while it was replaced
        "$folder/bin/python" -m ensurepip >/dev/null 2>&1
        has_pip "$folder" && return
        echo "$folder is not whole: making it anew"
    fi
    # What it says is kept back: after Ctrl-C, a traceback of Python's own.
    said=$("$python" -m venv --clear "$folder" 2>&1) || (($? != 130)) || return 130
    if ! has_pip "$folder"; then
        echo "error: $python cannot make a venv; on Debian: apt install python3-venv" \
            "${said:+(${said##*$'\n'})}" >&2
        return 2
    fi
}

has_pip() {
    "$1/bin/python" -m pip --version >/dev/null 2>&1
}

# find_packages PYTHON: one line within seconds, where pip would try for half a minute.
find_packages() {
    local place said
    place=$(mktemp -d)
    said=$("$1" -m pip download --quiet --disable-pip-version-check --no-deps --retries 0 \
        --timeout 10 --dest "$place" optuna 2>&1) && rm -rf -- "$place" && return
    rm -rf -- "$place"
    echo "error: pip finds no packages; the first time this needs a network" \
        "(${said##*ERROR: })" >&2
    return 2
}

# without_gpu PYTHON GROUP: the build of torch for CPUs, a tenth as large, where there is no NVIDIA
# GPU and the index of packages that pip uses has such a build.  The versions stay the group's.
without_gpu() {
    local pins
    if nvidia-smi --list-gpus 2>/dev/null | grep -q GPU ||
        "$1" -m pip show --quiet torch 2>/dev/null; then # or one is there: no other build
        return
    fi
    mapfile -t pins < <(
        "$1" - "$2" <<'EOF'
import re, sys
text = open("pyproject.toml", encoding="utf-8").read()
group = text.split(f"\n{sys.argv[1]} = [")[1].split("\n]")[0]
for name, version, sign in re.findall(
    r'"(torch|torchvision)==([\d.]+)(?:; python_version (>=|<) \'3\.11\')?"', group
):
    if not sign or (sign == ">=") == (sys.version_info >= (3, 11)):
        print(f"{name}=={version}+cpu")
EOF
    )
    if ((${#pins[@]})) && "$1" -m pip install --quiet "${pins[@]}" 2>/dev/null; then
        echo "No NVIDIA GPU: PyTorch's build for CPUs is installed."
    fi
}
