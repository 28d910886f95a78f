"""The parts of a training run, most of them built by a `build_*` function from their own section of the configuration.

tokenizer       text to ids and back
dataloader      batches, ahead of the step; data_sources opens what they are made of, data_state saves the place in it
document_mask   where the documents of a batch begin
loss            the losses
runner          a batch to gradients, eagerly; a pipeline is in distributed/pipeline_parallel.py
optimizer       Adam and AdamW; compact_optimizer the same in less memory
lr_scheduler    warm-up and decay
metrics         what a run says; history what happened to it beside its steps
run_guard       what ends a run between two steps
validate        the loss on held-out data; samples what the model writes there
generation      text from a trained model
"""
