# Defines `stages` as short for `python -m stages`, with completion of commands, rows and presets by Tab.
function stages; python -m stages $argv; end
complete -c stages -f -a '(COMP_WORDS=(commandline -cp) COMP_CWORD=(commandline -t) _STAGES_COMPLETE=fish_complete python -m stages | string replace -r "^[^,]*," "")'
