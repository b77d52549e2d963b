#!/bin/sh
# train.sh WORK_DIR: from an empty virtual environment to the checkpoint, in one command. WORK_DIR receives everything: the
# downloads, the checkpoints, the figures (*.log) and at last export/int4, what the binary carries.
# Every stage resumes: run it again after an interruption. Two cores and 12 GB of memory; about eighteen hours of training.
# To go on from the shipped weights instead: restore.py to averaged.pt, then the stages finer and together.
#   PYTHON=python3  the virtual environment's interpreter, with requirements.txt installed (made in WORK_DIR/venv if unset)
#   PROCESSES=2     one per core
#   SPEED=1         divides every stage's minutes: 20 tries the whole chain out
set -eu
mkdir -p "$1"
work=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
if [ -z "${PYTHON:-}" ]; then
    [ -x "$work/venv/bin/python" ] || python3 -m venv "$work/venv"
    PYTHON="$work/venv/bin/python"
    "$PYTHON" -m pip install --quiet --extra-index-url https://download.pytorch.org/whl/cpu -r "$here/requirements.txt"
fi
export PYTHON

once() {    # once NAME COMMAND...: what has been done is not done again
    name=$1; shift
    [ -e "$work/$name.done" ] && return
    echo "== $name" && "$@" && touch "$work/$name.done"
}
stage() {   # stage NAME MINUTES SCRIPT ARGS...: a training of so many minutes that continues where NAME.pt stands
    name=$1; minutes=$(awk "BEGIN { print $2 / ${SPEED:-1} }"); script=$3; shift 3
    once "$name" sh "$here/launch.sh" "${PROCESSES:-2}" "$here/$script" "$work" "$name" --minutes "$minutes" "$@"
}

once fetched sh "$here/fetch.sh" "$work"
once drawn "$PYTHON" "$here/sprites.py" "$work"
once spelled "$PYTHON" "$here/tokenizer.py" "$work/tokenizer.json"
stage teacher 60 teacher.py --decay --seed 1
stage tower 75 train_tower.py --teacher teacher --decay --seed 31
stage letters 40 train_tower.py --start "$work/tower.pt" --teacher teacher --decay --muon .013 --adam 7e-4 --text .48 --seed 61
stage whole 38 train_tower.py --start "$work/letters.pt" --side 336 --batch 16 --decay --muon .008 --adam 5e-4 --text .36 --seed 71
learn="train_language.py --batch 10 --every 2 --muon .014 --adam 1.4e-3 --looks .15 --mix global=.28,single=.04,talk=.02,pair=.13,detail=.53"
joint="--align 0 --joint 3 --drawn 10 --pool 600"    # the tower's last layers learn to count with the decoder
stage language 240 $learn --drawn 4 --tower whole --align 3 --rates 1 .02 --seed 91
stage counted 70 $learn --start "$work/language.pt" $joint --mix single=.56,talk=.02,pair=.08,detail=.34 --rates .25 .04 --seed 211
stage rounded 35 $learn --start "$work/counted.pt" $joint --mix single=.42,talk=.04,pair=.08,detail=.46 --int4 --rates .04 .008 --seed 221
# Counting is what comes last, and ends of trainings differ by chance: several more, each from the one before, and their mean.
more="--joint 3 --align 0 --drawn 10 --pool 600 --int4 --mix single=.52,talk=.03,pair=.08,detail=.37"
heaps="--kinds single=.05,several=.16,heap=.59,text=.12,shapes=.03,clothing=.05"
crowds="--kinds single=.06,several=.18,heap=.36,crowd=.22,text=.1,shapes=.03,clothing=.05"
stage grounds 105 $learn --start "$work/rounded.pt" $more --rates .14 .004 --seed 311
stage piled 118 $learn --start "$work/grounds.pt" $more $heaps --rates .2 .004 --seed 411
stage piled_again 110 $learn --start "$work/piled.pt" $more $heaps --rates .2 .004 --seed 511
once meant "$PYTHON" "$here/average.py" "$work" meant piled=.5 piled_again=.5
stage sorted 96 $learn --start "$work/meant.pt" $more $crowds --looks .22 --rates .25 .004 --seed 811
once averaged "$PYTHON" "$here/average.py" "$work" averaged piled=.2 piled_again=.2 sorted=.6
# The server shows a picture in four crops: so do more of the steps, and what counts may look at them.
finer="--mix single=.48,talk=.03,pair=.07,detail=.42 --kinds single=.06,several=.18,heap=.4,crowd=.2,text=.09,shapes=.03,clothing=.04"
stage finer 88 $learn --start "$work/averaged.pt" $more $finer --looks .22 --settle 3 --rates .2 .006 --seed 1011
once together "$PYTHON" "$here/average.py" "$work" together finer=.6 averaged=.4
"$PYTHON" "$here/export.py" "$work" together "$work/export"
once asked "$PYTHON" "$here/suite.py" "$work" "$work/suite"
echo "now: visor eval --checkpoint $work/export/int4 --suite $work/suite --report report.html"
