"""What happens before torch starts: the options against this machine, its files and its processes; then the workers.

preflight.py     what the options point to: tokenizer, data, folders, packages
environment.py   what the environment holds or lacks: variables of upstream's, keys, compilers; the workers' defaults
launcher.py      what run_train.sh and the command `torchtitan` call: checks, starts the workers, says how they ended
agent.py         torchrun's agent, which also knows what no restart heals, and memory that ran out
dry_run.py       all up to the first step, told and not done

Nothing here imports torch before the checks have passed, so that a mistake costs a fraction of a second.
"""
