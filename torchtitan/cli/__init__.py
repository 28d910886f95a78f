"""The program `torchtitan`: one module for each command, and what they read of finished runs. Nothing knows this room.

main        finds the command
generate    text from a checkpoint
convert     weights to and from Hugging Face's format
estimate    the memory of a run
tokenizer   train one
tokenize    a dataset, once
report      runs as one HTML page, of charts (chart.py) and tables, in the style of report.css
compare     two runs, new or finished: their largest differences, and the report
runs        what a run has left in its output folder
"""
