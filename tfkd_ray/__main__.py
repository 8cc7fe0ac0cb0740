"""`python -m tfkd_ray`."""

import sys

from tfkd_ray.cli import main

sys.exit(main())
