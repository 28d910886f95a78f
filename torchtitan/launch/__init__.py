"""What happens before torch starts: the options against this machine, its files and its processes; then the workers.

preflight.py   what the options point to: tokenizer, data, folders, packages
launcher.py    what run_train.sh and the command `torchtitan` call: checks, starts the workers, says how they ended

Nothing here imports torch before the checks have passed, so that a mistake costs a fraction of a second.
"""
