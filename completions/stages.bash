# Defines `stages` as short for `python -m stages`, with completion of commands, rows and presets by Tab.
stages() { python -m stages "$@"; }
_stages() { local IFS=$'\n'; COMPREPLY=($(COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD _STAGES_COMPLETE=bash_complete python -m stages | cut -d, -f2)); }
complete -F _stages stages
