"""`python -m tfkd_ray`."""

import sys

from tfkd_ray.settings.own_code import working_directory_last

if __name__ == "__main__":
    working_directory_last()

from tfkd_ray.cli.main import main

sys.exit(main())
