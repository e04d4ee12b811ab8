# shellcheck shell=bash
# Shared by the scripts in this folder: sourced, never run. For Linux.
# Words for people go to stderr, so that a script's stdout is its result.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
cache=${GGTOOL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ggtool}
stage=$cache/stage # scratch space; used only under the cache lock, so it is never anyone else's
# shellcheck source=vendor/llama.cpp/PIN
. "$root/vendor/llama.cpp/PIN"

say() { printf '%s\n' "$*" >&2; }

die() {
    say "error: $*"
    exit 1
}

# An interrupt must not leave compilers running, so the whole process group of the running child goes.
child=
on_exit() {
    if [[ -n $child ]]; then
        kill -TERM -- "-$child" 2>/dev/null || true
        wait "$child" 2>/dev/null || true
    fi
}
trap on_exit EXIT
trap 'exit 129' HUP
trap 'say; say interrupted; exit 130' INT
trap 'exit 143' TERM

# lock FILE: hold it until this script ends. Children inherit it, so an orphaned compiler still holds it.
lock() {
    mkdir -p "$(dirname "$1")"
    local handle
    exec {handle}>>"$1"
    if ! flock --nonblock "$handle"; then
        say "waiting for another run of these scripts ($1)"
        flock "$handle"
    fi
}

# fresh_stage: an empty scratch folder, whatever an interrupted run left in it. Call under the cache lock.
# Its tmp/ is for pip, whose own leftovers then go the same way.
fresh_stage() {
    rm -rf "$stage"
    mkdir -p "$stage/tmp"
}

# elapsed START: time since then, as m:ss.
elapsed() { printf '%d:%02d' $(((SECONDS - $1) / 60)) $(((SECONDS - $1) % 60)); }

# progress LOG: the last "[ 12%]" (make) or "[34/567]" (ninja) of a build.
progress() { tail -c 200000 "$1" 2>/dev/null | grep -oE '\[ *[0-9]+(%|/[0-9]+)\]' | tail -n 1 || true; }

# logged LOG WORDS COMMAND...: run COMMAND with its output in LOG; show WORDS, progress and elapsed time.
logged() {
    local log=$1 words=$2 start=$SECONDS told=$SECONDS
    shift 2
    mkdir -p "$(dirname "$log")"
    [[ -t 2 ]] || say "$words ..."
    set -m # job control gives the child a process group of its own, for on_exit
    "$@" >"$log" 2>&1 </dev/null &
    child=$!
    set +m
    while kill -0 "$child" 2>/dev/null; do
        sleep 0.5
        if [[ -t 2 ]]; then
            printf '\r\033[K%s  %s %s' "$words" "$(elapsed "$start")" "$(progress "$log")" >&2
        elif ((SECONDS - told >= 30)); then
            told=$SECONDS
            say "  still at it after $(elapsed "$start") $(progress "$log")"
        fi
    done
    [[ ! -t 2 ]] || printf '\r\033[K' >&2
    local status=0
    wait "$child" || status=$?
    child=
    if ((status)); then
        tail -n 25 "$log" >&2
        die "$words: failed after $(elapsed "$start"); the whole log: $log"
    fi
    say "$words: done in $(elapsed "$start")"
}

# find_python: set python (the interpreter behind any venv or shim) and version; only 3.10 to 3.13 will do.
# PYTHON chooses; without it an existing .venv keeps the interpreter that it was made with.
find_python() {
    local candidate=${PYTHON:-} facts
    if [[ -z $candidate ]]; then
        candidate=python3
        ! "$venv/bin/python" -c '' 2>/dev/null || candidate=$venv/bin/python
    fi
    facts=$("$candidate" -c 'import os, sys; print("%d.%d.%d %s" % (sys.version_info[:3] + (os.path.realpath(sys.executable),)))' 2>/dev/null) ||
        die "cannot run '$candidate': install Python 3.10 to 3.13, or name one with PYTHON=/path/to/python3.12"
    read -r version python <<<"$facts"
    [[ $version == 3.1[0-3].* ]] ||
        die "'$candidate' is Python $version, ggtool needs 3.10 to 3.13: name one with PYTHON=/path/to/python3.12"
}

# new_venv FOLDER
new_venv() {
    rm -rf "$1"
    "$python" -m venv "$1" >&2 ||
        die "'$python -m venv' failed; on Debian and Ubuntu its package is python3-venv"
}

# first_command NAME...: the first of them that exists.
first_command() {
    local name
    for name in "$@"; do
        ! command -v "$name" || return 0
    done
    return 1
}

# need_compilers: llama.cpp is C and C++.
need_compilers() {
    first_command ${CC:+"${CC%% *}"} cc gcc clang >/dev/null ||
        die "no C compiler: llama.cpp is compiled from source; on Debian and Ubuntu: apt-get install build-essential"
    first_command ${CXX:+"${CXX%% *}"} c++ g++ clang++ >/dev/null ||
        die "no C++ compiler: llama.cpp is compiled from source; on Debian and Ubuntu: apt-get install build-essential"
}

# broken_flags: the compiler flags that leave out what vendor/llama.cpp/BROKEN says of the pinned commit.
# A compiler that does not know a flag cannot use those instructions either.
broken_flags() {
    local commit flags flag
    [[ -f $root/vendor/llama.cpp/BROKEN ]] || return 0
    while IFS='|' read -r commit flags _; do
        [[ ${commit// /} == "$LLAMA_CPP_COMMIT" ]] || continue
        for flag in $flags; do
            ! "$compiler" "$flag" -E -x c /dev/null >/dev/null 2>&1 || printf '%s ' "$flag"
        done
    done <"$root/vendor/llama.cpp/BROKEN"
}

# What a build that fails its self-test is made again without, one after the other: words | compiler flags. Last of all comes
# the portable build.
slower_builds() {
    [[ $(uname -m) != x86_64 ]] || printf '%s\n' \
        "AVX-512's and AVX's newer products|-mno-avx512fp16 -mno-avx512bf16 -mno-avx512vnni -mno-avxvnni" \
        "AVX-512|-mno-avx512f"
}

# choose_build: set how llama.cpp is compiled here: build_flags for the compiler, build_options for CMake, build_for in
# words, wheels, the folder for what is built, and build, a name for all that compiled code depends on. llama.cpp compiles
# for this very CPU (GGML_NATIVE) without what is known to be broken, and without what failed its self-test here;
# GGTOOL_PORTABLE=1 compiles for every x86-64-v3 or arm64 machine, for images that move.
choose_build() {
    local compiler broken words flags
    compiler=$(first_command ${CC:+"${CC%% *}"} cc gcc clang) || compiler=
    broken=$(broken_flags)
    build=
    if [[ ${GGTOOL_PORTABLE:-0} != 1 ]]; then
        while IFS='|' read -r words flags; do
            compose_build "this CPU${words:+ without }$words" "$broken$flags" -march=native ""
            [[ -f $wheels/refused ]] || return 0
        done < <(printf '|\n' && slower_builds)
    fi
    if [[ $(uname -m) == x86_64 ]]; then
        compose_build "every x86-64-v3 machine" "$broken" -march=x86-64-v3 "-DGGML_NATIVE=OFF -DGGML_SSE42=ON \
-DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_BMI2=ON -DGGML_FMA=ON -DGGML_F16C=ON"
    else
        compose_build "every $(uname -m) machine" "$broken" "" -DGGML_NATIVE=OFF
    fi
}

# compose_build WORDS FLAGS TARGET OPTIONS: set the variables of choose_build. The compiler's own list of what it may use with
# these flags, its version, and the variables that steer a build are all in the name.
compose_build() {
    local features
    build_for=$1 build_flags=$2 build_options=$4
    # shellcheck disable=SC2086 # flags are meant to split
    features=$("$compiler" $build_flags $3 -dM -E -x c /dev/null 2>/dev/null) ||
        features=$(grep -m 1 -iE '^(flags|features)' /proc/cpuinfo || true)
    build=$(printf '%s\n' "$features" "${CC:-}" "${CXX:-}" "${CFLAGS:-}" "${CXXFLAGS:-}" "${LDFLAGS:-}" \
        "$build_options${build_options:+ }${CMAKE_ARGS:-}" | sha256sum | cut -c 1-12)
    wheels=$cache/wheels/py3-$(uname -s -m | tr 'A-Z ' 'a-z-')-$build # the wheel is py3-none: one serves every Python
}

# built_as_chosen COMMAND...: run COMMAND, a build, with what choose_build chose. The user's own flags come first, for the
# compiler drops what is left out wherever it stands; their CMake options come last and win.
built_as_chosen() {
    CFLAGS="${CFLAGS:-} $build_flags" CXXFLAGS="${CXXFLAGS:-} $build_flags" \
        CMAKE_ARGS="$build_options ${CMAKE_ARGS:-}" "$@"
}

# checked_archive: set archive, the pinned source archive in the cache, fetched with pip where it is not there.
# Call under the cache lock, after find_python.
checked_archive() {
    archive=$cache/archives/$ARCHIVE
    if [[ ! -f $archive ]]; then
        fresh_stage
        new_venv "$stage/venv" # a throwaway pip: the system's own may be missing, or not ours to use
        # With the hash in a requirements file pip checks it before it runs any of the archive's code.
        printf 'llama-cpp-python==%s --hash=sha256:%s\n' "$LLAMA_CPP_PYTHON_VERSION" "$ARCHIVE_SHA256" >"$stage/wanted"
        TMPDIR=$stage/tmp logged "$cache/logs/archive.log" "fetching $ARCHIVE (77 MB)" \
            "$stage/venv/bin/python" -m pip download --no-deps --no-binary llama-cpp-python \
            --require-hashes --requirement "$stage/wanted" --dest "$stage"
        mkdir -p "$cache/archives"
        mv "$stage/$ARCHIVE" "$archive"
        rm -rf "$stage"
    fi
    sha256sum --check --status <<<"$ARCHIVE_SHA256  $archive" ||
        die "$archive does not have the sha256 of vendor/llama.cpp/PIN: remove it and run this again"
}
