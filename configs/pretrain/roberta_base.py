"""RoBERTa-base (Liu et al. 2019): BERT-base on full sentences, without next-sentence prediction.

  bertjax vocab    --input=TEXTS --size=50265 --kind=bpe --out=tokenizer.json
  bertjax prepare  --config=roberta_base --out=ROWS \\
      --config.data.input=TEXTS --config.data.vocab=tokenizer.json
  bertjax pretrain --config=roberta_base --workdir=DIR --config.data.prepared=ROWS

8,192 rows of 512 tokens for 500,000 steps, learning rate 6e-4 after 24,000 steps of warm-up, Adam
with b2 = 0.98, no clipping. Rows are full sentences of one or more documents, and masks are sampled
again in each epoch. The paper used 160 GB of text and 1,024 V100 GPUs; the published model has
87.6 on MNLI and 94.8 on SST-2 (development sets). Of 16 GB a chip, 8 rows of BERT-base take 5.9
(docs/benchmarks.md): on v5e:16x16, which has 32 rows a chip, set `gradient_accumulation_steps=4`.

`model.position_offset` is the id of the tokenizer's padding token + 1: 2 for a byte-level BPE of
RoBERTa's order (<s>, <pad>, </s>), 1 for a vocab.txt that begins with [PAD].

After a colon: `smoke` (seconds) and the words of `bert_base`.
"""

from bertjax.config import pretraining, vary


def get_config(arg=''):
  config = pretraining('roberta_base')
  config.model.dtype = 'bfloat16'
  config.nsp = False
  config.data.kind, config.data.length = 'full_sentences', 512
  config.data.short_seq_prob, config.data.lowercase = 0.0, False
  config.masking.max_predictions = 77
  config.batch_size, config.num_train_steps, config.warmup_steps = 8192, 500_000, 24_000
  config.learning_rate, config.schedule = 6e-4, 'linear'
  config.optimizer.name, config.optimizer.b2, config.optimizer.clip_norm = 'adamw', 0.98, 0.0
  return vary(config, arg)
