"""What is replaced in Paddle and PaddleNLP, by its short name: `python -m finetune.stand_ins`."""

from finetune.machine.stand_ins import main

if __name__ == "__main__":
    raise SystemExit(main())
