# shellcheck shell=bash
# What the launchers beside this file share: reading options, quoting, printing or running commands.
# Works with bash 3.2, the one of macOS; hence no ${x@Q} and the care about empty arrays.

# Exit status of a program that was pre-empted and has saved: the same command resumes.
# shellcheck disable=SC2034 # for the launchers
PREEMPTED=75
# Of one whose run lost another of its processes: with all of them the same command resumes.
# shellcheck disable=SC2034
LOST=76
dry_run=no
command=()

# Ends a launcher that was called wrongly: one line that names the argument and the remedy.
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# The comment at the head of a launcher is its help.
help() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit 0
}

# One word, quoted for any POSIX shell.
quote() {
  local LC_ALL=C word=$1 quoted='' mark="'"
  case $word in
    '' | *[!A-Za-z0-9_./:=,@%+-]*) ;;
    *)
      printf '%s' "$word"
      return
      ;;
  esac
  while [[ $word == *$mark* ]]; do
    quoted+="${word%%"$mark"*}'\\''"
    word=${word#*"$mark"}
  done
  printf "'%s'" "$quoted$word"
}

# A command line of all words.
quote_all() {
  local word space=''
  for word in "$@"; do
    printf '%s' "$space"
    quote "$word"
    space=' '
  done
}

# Runs a command, or prints it.
run() {
  if [[ $dry_run == yes ]]; then
    quote_all "$@"
    printf '\n'
  else
    "$@"
  fi
}

# parse "OPTION ... FLAG? ..." "$@": sets a variable of its name for each option given, to yes for
# those without a value, and command to all words after --.
parse() {
  local known=" $1 " word option value
  shift
  while (($#)); do
    word=$1
    shift
    case $word in
      -h | --help) help ;;
      --dry-run) dry_run=yes ;;
      --)
        command=("$@")
        break
        ;;
      --*)
        option=${word%%=*}
        option=${option#--}
        if [[ $known == *" $option? "* && $word != *=* ]]; then
          printf -v "$option" yes
          continue
        fi
        [[ $known == *" $option "* ]] || fail "--$option: no such option; --help lists them"
        if [[ $word == *=* ]]; then
          value=${word#*=}
        elif (($#)) && [[ $1 != --* ]]; then
          value=$1
          shift
        else
          value=''
        fi
        [[ -n $value ]] || fail "--$option needs a value: give --$option=..."
        [[ $value != *$'\n'* ]] || fail "--$option: has more than one line; give one"
        printf -v "$option" '%s' "$value"
        ;;
      *) fail "unexpected argument '$word': options are --name=value, the command comes after --" ;;
    esac
  done
  if ((${#command[@]} == 0)); then
    fail "the command is missing: give it last, after --, say" \
      "-- python -m dec_diffusion.main --config=configs/clusterddpm.py"
  fi
}

# require OPTION "what it is": it was given.
require() {
  [[ -n ${!1} ]] || fail "--$1 is missing: give $2, --$1=..."
}

# whole OPTION LEAST: its value, if there is one, is a whole number and no less.
whole() {
  [[ -z ${!1} ]] && return
  [[ ${!1} =~ ^(0|[1-9][0-9]{0,5})$ && ${!1} -ge $2 ]] ||
    fail "--$1=${!1}: must be a whole number of at least $2"
}
