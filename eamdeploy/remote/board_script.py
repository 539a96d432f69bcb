"""The program for the board's own POSIX shell that receives engines, measures them and leaves nothing behind.

It measures when everything has arrived and the other side says so with one line.

It works in one folder that it makes and that an exit trap removes. Without a terminal, sshd sends no signal when a
connection ends, but closes the program's input: from the moment when the engines have arrived, a process waits for
that and ends all. A connection that breaks without a word from either side is noticed by none of this; a deadline
then ends the work.

What is measured runs in a session of its own (`setsid`, where there is one), so that its own processes end with it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

WORK = "{work}/"

_PROGRAM = r"""
umask 077
exec 3<&0
work= child= watch= clock= copied=

say() { printf '\n%s %s\n' "$mark" "$*"; }

end_child() {
    [ -n "$child" ] || return 0
    kill -TERM "-$child" 2>/dev/null || kill -TERM "$child" 2>/dev/null || return 0
    sleep 1
    kill -KILL "-$child" 2>/dev/null || kill -KILL "$child" 2>/dev/null
}

clean() {
    end_child
    [ -z "$work" ] || rm -rf "$work"
}

finish() {
    code=$?
    trap - EXIT
    trap '' HUP INT PIPE TERM
    [ -z "$watch$clock" ] || kill $watch $clock 2>/dev/null
    clean
    exit "$code"
}

trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 141' PIPE
trap 'exit 143' TERM

watch_input() {
    (
        while read -r _; do :; done
        kill -TERM $$ 2>/dev/null || { kill "$clock"; clean; }
    ) <&3 >/dev/null 2>&1 &
    watch=$!
}

run() {
    if ! command -v "$1" >/dev/null 2>&1; then
        echo "$1: not found" >"$work/errors"
        code=127
        return
    fi
    "$leader" "$@" </dev/null 2>"$work/errors" 3<&- &
    child=$!
    [ -z "$copied" ] || watch_input
    wait "$child"
    code=$?
    child=
}

disk() { df -Pk "$work" 2>&1; say disk; }

errors() { tail -c 65536 "$work/errors"; say errors; }

leader=setsid
command -v setsid >/dev/null 2>&1 || leader=env

say begin
work=$(mktemp -d "${TMPDIR:-/tmp}/eamdeploy.XXXXXXXX" 2>&1) || { echo "$work"; work=; say no-folder; exit 1; }
echo "$work"; say folder
export TMPDIR="$work"
(
    trap 'kill "$nap" 2>/dev/null; exit' TERM
    sleep "$deadline_s" & nap=$!
    wait "$nap"
    kill -TERM $$ 2>/dev/null || clean
) </dev/null >/dev/null 2>&1 3<&- &
clock=$!
disk
run_eamdeploy doctor --json; say doctor "$code"; errors

head -c "$archive_bytes" <&3 | ( cd "$work" && tar -xmof - ) 2>&1
copied=$?
say copied "$copied"
[ "$copied" = 0 ] || exit 1
sizes 2>&1; say sizes
read -r go <&3 || exit 1
measure; say profile "$code"; errors
exit 0
"""


def board_script(
    mark: str,
    remote_command: Sequence[str],
    arguments: Sequence[str],
    files: Sequence[str],
    *,
    archive_bytes: int,
    deadline_s: float,
) -> bytes:
    """The program, to be run by `bootstrap`.

    Args:
        mark: the word that begins the lines which end a part of the output.
        remote_command: the words that run eamdeploy there; `~/` at the beginning of one is the home folder there.
        arguments: of `eamdeploy`, in which `WORK` at the beginning stands for the folder there.
        files: in the archive, to be measured by their size.
    """
    command = " ".join(map(_quote_command, remote_command))
    sizes = "; ".join(f'wc -c <"$work"/{shlex.quote(name)}' for name in files)
    lines = [
        f"mark={shlex.quote(mark)}",
        f"archive_bytes={archive_bytes}",
        f"deadline_s={max(round(deadline_s), 1)}",
        f'run_eamdeploy() {{ run {command} "$@"; }}',
        f"sizes() {{ {sizes}; }}",
        f"measure() {{ run_eamdeploy {' '.join(map(_quote_argument, arguments))}; }}",
    ]
    return ("\n".join(lines) + _PROGRAM).encode(errors="surrogateescape")


def _quote_command(word: str) -> str:
    return f"~/{shlex.quote(word[2:])}" if word.startswith("~/") else shlex.quote(word)


def _quote_argument(word: str) -> str:
    return f'"$work"/{shlex.quote(word.removeprefix(WORK))}' if word.startswith(WORK) else shlex.quote(word)


def bootstrap(script: bytes) -> str:
    """What a login shell of any kind is asked to run; `script` must then come first through its input.

    A login shell may have its own idea of quotes and line breaks; this line means the same to all. `dd` reads not one
    byte too many, which a shell that reads its program does.
    """
    return f"""exec sh -c 'eval "$(dd bs=1 count={len(script)} 2>/dev/null)"'"""
