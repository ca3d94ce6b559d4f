"""Write finetune/settings/argument_schema.json, the JSON Schema of argument files, from the records of the settings.

python tools/argument_schema.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from finetune.settings.schema import SCHEMA_FILE, format_schema  # noqa: E402

if __name__ == "__main__":
    SCHEMA_FILE.write_text(format_schema(), encoding="utf-8")
