"""The check of the installed versions by its short name: `python -m finetune.environment`."""

from finetune.machine.environment import main

if __name__ == "__main__":
    raise SystemExit(main())
