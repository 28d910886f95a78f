from torchtitan.cli.main import run

run()
