# Defines `stages` as short for `python -m stages`, with completion of commands, rows and presets by Tab.
stages() { python -m stages "$@"; }
_stages() { compadd -- $(COMP_WORDS="$words" COMP_CWORD=$((CURRENT-1)) _STAGES_COMPLETE=bash_complete python -m stages | cut -d, -f2); }
compdef _stages stages
