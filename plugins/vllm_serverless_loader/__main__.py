"""``python -m vllm_serverless_loader`` is ``serverless-loader``."""

from __future__ import annotations

import sys

from vllm_serverless_loader.cli import main

if __name__ == "__main__":
    sys.exit(main())
