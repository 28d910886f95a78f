import sys

from torchtitan.launch.launcher import main

sys.exit(main())
