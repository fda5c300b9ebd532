"""The fields of a config: each with its default and its help, in a table for each kind of run."""

import dataclasses

from bertjax.model import config as model_config

# Field -> (default, help). Help is a self-contained noun phrase: unit, meaning of the default,
# choices.
SHARED = {
  'init_from': ('', 'model to start from: a model directory (bertjax, Hugging Face, Google), a '
                    "run's workdir or a hub name"),
  'init_layers': ('', 'layers of init_from that the model starts with, from 0, such as '
                      '0,2,4,7,9,11; empty = all'),
  'distill.teacher': ('', 'frozen teacher: a model of any kind with the same vocabulary; empty = '
                          'none'),
  'distill.temperature': (2.0, 'divisor of the logits of student and teacher in soft targets'),
  'distill.soft_weight': (0.5, "weight of the teacher's soft targets; the task's loss has the "
                               'rest'),
  'lora.rank': (0, 'rank of adapters (LoRA), which are trained instead of init_from; 0 = none'),
  'lora.alpha': (16.0, 'scale of the adapters times their rank'),
  'lora.targets': ('query,value', 'matrices with adapters: names such as query, mlp/in or q_proj, '
                                  'or patterns such as encoder/layers/.*'),
  'lora.rslora': (False, 'scale alpha / sqrt(rank) instead of alpha / rank'),
  'lora.modules_to_save': ('', 'heads trained completely beside a new one, such as pooler or mlm'),
  'lora.save': ('merged', "form of model/: 'merged' with the weights of init_from, or 'peft' = a "
                          'folder of adapters'),
  'seed': (0, 'seed of initial weights, data order, masks and dropout'),
  'prng_impl': ('threefry2x32', "generator of dropout: 'threefry2x32', or 'rbg' (faster on TPU, "
                                'but its bits depend on the mesh)'),
  'batch_size': (256, 'examples in a global batch, over all devices and microbatches'),
  'learning_rate': (1e-4, 'peak learning rate'),
  'schedule': ('google', "learning rate after the warm-up: 'google' (linear decay, counted from "
                         "step 0), 'linear', 'cosine', 'one_minus_sqrt', 'constant', or 'wsd', "
                         "'wsd_linear', 'wsd_cosine' (constant, then 1 - sqrt or another decay)"),
  'decay_ratio': (0.1, "fraction of the steps in the decay of the schedules 'wsd'"),
  'optimizer.name': ('bert', "optimizer: 'bert' (AdamW without bias correction), 'adamw', "
                             "'stable_adamw', 'lamb', 'muon' (for the layers' kernels, AdamW for "
                             "the rest) or 'sgd'"),
  'optimizer.b1': (0.9, 'decay rate of the first moment; momentum of sgd'),
  'optimizer.b2': (0.999, 'decay rate of the second moment'),
  'optimizer.eps': (1e-6, 'epsilon added to sqrt(v), outside the square root'),
  'optimizer.weight_decay': (0.01, 'decoupled weight decay; biases and LayerNorm are excluded'),
  'optimizer.clip_norm': (1.0, 'maximum global norm of the gradient; 0.0 = no clipping'),
  'optimizer.average': (0.0, 'decay rate of a moving average of the parameters, which is evaluated '
                             'and saved as the model, such as 0.999; 0.0 = the parameters are'),
  'data.length': (128, 'maximum sequence length in tokens'),
  'data.loader': ('auto', "input pipeline: 'tfdata', 'threads', or 'auto' = tfdata where "
                          'TensorFlow is installed'),
  'mesh.data': (-1, 'data-parallel replicas; -1 = all devices that fsdp and tensor leave'),
  'mesh.fsdp': (1, 'replicas that shard parameters and optimizer moments among them'),
  'mesh.tensor': (1, 'devices that shard each layer (tensor parallelism)'),
  'patience': (0, 'evaluations without improvement before the run stops early; 0 = never'),
  'log_every': (100, 'steps between log lines'),
  'trackers': ('', "services that get the metrics too: 'wandb', 'trackio', or both with a comma"),
  'license': ('', "licence of the model for its card, such as 'apache-2.0'; empty = 'unknown'"),
  'max_to_keep': (2, 'newest checkpoints that are kept, beside the best one'),
}  # fmt: skip


PRETRAINING = SHARED | {
  'nsp': (True, 'next-sentence prediction beside the masked LM; False = full sentences in one '
                'segment'),
  'objective': ('mlm', "training objective: 'mlm', 'electra' (generator and discriminator, needs "
                       "nsp=False), 'distill' (from distill.teacher, needs nsp=False) or "
                       "'next_token' (left-to-right ablation, needs model.causal=True)"),
  'generator_size': (0.25, "width of ELECTRA's generator as a fraction of the discriminator's"),
  'generator_from': ('', "model from which ELECTRA's generator starts, where init_from names its "
                         'discriminator'),
  'distill.mlm_weight': (2.0, 'weight of the masked LM beside the terms of the teacher'),
  'distill.soft_weight': (5.0, "weight of the teacher's masked-LM probabilities"),
  'distill.cosine_weight': (1.0, "weight of the cosine to the teacher's last states"),
  'distill.attention_weight': (0.0, "weight of the relations of a layer's queries and keys "
                                    '(MiniLM)'),
  'distill.value_weight': (0.0, "weight of the relations of a layer's values (MiniLM)"),
  'distill.layer': (-1, "the teacher's layer of these relations, from 0; -1 = the last"),
  'rtd_weight': (50.0, "weight of ELECTRA's replaced-token detection beside the masked LM"),
  'init_resize': (False, 'permission for init_from to have another vocabulary or maximum length'),
  'num_train_steps': (1_000_000, 'total number of training steps; 0 = the sum of the stages'),
  'gradient_accumulation_steps': (1, 'microbatches per step; without dropout the result equals '
                                     'that of one large batch'),
  'warmup_steps': (10_000, 'steps of linear warm-up from 0 to the peak learning rate'),
  'data.input': ('', 'raw text: files, folders, globs, tfds:NAME, hf:NAME or embedded, by commas; '
                     'NAME=SOURCE,NAME=SOURCE for a mixture'),
  'data.prepared': ('', 'prepared dataset directory, written by `bertjax prepare`; an alternative '
                        'to data.input; NAME=DIR,NAME=DIR for a mixture'),
  'data.mixture': ('', 'shares of the named sources of data.input or data.prepared, '
                       'wiki=0.7,books=0.3, with the sum 1; empty = by size'),
  'data.mixture_exponent': (1.0, 'exponent of the sizes of sources where data.mixture is empty; '
                                 'below 1.0 small ones get more (0.7 in multilingual BERT)'),
  'data.streaming': (False, 'training on data.input as it is read, without preparing it first'),
  'data.format': ('prose', 'format of data.input: prose, google, wikitext, jsonl, parquet, tfds or '
                           'tfrecord'),
  'data.text_key': ('text', 'JSONL field, Parquet column or TFDS feature that contains the text'),
  'data.encoding': ('utf-8', 'encoding of text files by its Python name: utf-8, gb18030, utf-16, '
                             'latin-1 or another'),
  'data.on_bad_row': ('stop', "JSONL and Parquet records without text: 'stop', or 'skip' and count "
                              'them'),
  'data.vocab': ('', 'vocabulary: vocab.txt, a SentencePiece *.model, a tokenizer.json or a model '
                     'directory; a prepared dataset contains its own'),
  'data.lowercase': (True, 'lower-casing, which also strips accents, for "uncased" vocabularies'),
  'data.rules': ('huggingface', 'tokenization rules where the reference implementations differ: '
                                "'huggingface' or 'google'"),
  'data.kind': ('', 'example format: nsp, sop, doc_sentences or full_sentences; empty = nsp, or '
                    'doc_sentences with nsp=False'),
  'data.heldout_fraction': (0.05, 'fraction of documents held out for evaluation, selected by a '
                                  'hash of their text; 1.0 = all'),
  'data.dupe_factor': (1, 'copies of the corpus, each with other sentence pairs'),
  'data.short_seq_prob': (0.1, 'probability that an example gets a random shorter length'),
  'data.max_sequences_per_row': (1, 'maximum number of sequences packed into one row; 1 = no '
                                    'packing'),
  'data.num_shards': (0, 'files of the prepared training set; 0 = one per 64 MB of text'),
  'data.binary': ('refuse', "binary files in data.input: 'refuse' or 'skip'"),
  'data.cache_dir': ('', 'directory in which raw text is prepared; empty = $BERTJAX_CACHE or '
                         '~/.cache/bertjax'),
  'masking.rate': (0.15, "fraction of a row's tokens to predict"),
  'masking.max_predictions': (20, 'maximum number of predictions per row: 20 at length 128, 76 at '
                                  '512; -1 = from masking.rate'),
  'masking.mask_prob': (0.8, 'probability that a selected token becomes [MASK]'),
  'masking.random_prob': (0.1, 'probability that a selected token becomes a random token; the rest '
                               'is unchanged'),
  'masking.unit': ('subword', "masking unit: 'subword', 'whole_word' or 'span' (n-grams of words)"),
  'masking.max_span': (3, 'maximum words per span; n words have a probability proportional to 1/n'),
  'eval_every': (10_000, 'steps between evaluations on held-out examples; 0 = at the end only'),
  'max_eval_examples': (10_000, 'maximum number of held-out examples per evaluation'),
  'save_every': (1_000, 'steps between checkpoints'),
  'on_divergence': ('stop', "reaction to a loss that is not finite: 'stop', or 'skip' = return to "
                            'the last checkpoint and skip the batches since'),
  'loss_spike_threshold': (0.0, 'nats above the median of the last 100 losses that count as '
                                'divergence; 0.0 = off'),
  'compilation_cache_dir': ('', 'directory of compiled programs for the next start; gs:// works; '
                                'empty = none'),
  'stall_seconds': (3600.0, 'seconds without progress after which the process exits with code 75; '
                            '0.0 = never'),
  'save_model': ('last', "step saved as model/: 'last', or 'best' (lowest held-out loss)"),
}  # fmt: skip

# Fields of a stage that replace one of the run: name -> that field. Those of the model change no
# shape of a parameter.
REPLACED = {
  'length': 'data.length', 'batch_size': 'batch_size', 'mask_rate': 'masking.rate',
  'max_predictions': 'masking.max_predictions', 'prepared': 'data.prepared',
  'input': 'data.input', 'mixture': 'data.mixture', 'rope_theta': 'model.rope_theta',
  'remat': 'model.remat',
}  # fmt: skip

FINETUNING = SHARED | {
  'task.name': ('sst2', 'task: a name in bertjax.TASKS, such as sst2, squad1, conll2003 or table'),
  'reinit_head': (True, "new output layer; False = the model's own layer for this task"),
  'reinit_top_layers': (0, 'top layers to re-initialise, with the pooler (Zhang et al. 2021)'),
  'num_trainable_layers': (-1, 'top layers that are trained, without embeddings; -1 = all, 0 = '
                               'frozen encoder'),
  'layerwise_lr_decay': (1.0, 'ratio of the learning rate of a layer to that of the layer above'),
  'head_lr_multiplier': (1.0, 'learning-rate multiplier outside the encoder, such as 10.0 for a '
                              'CRF or BiLSTM'),
  'gradient_accumulation_steps': PRETRAINING['gradient_accumulation_steps'],
  'num_seeds': (1, 'runs with consecutive seeds, trained together; the first uses `seed`'),
  'num_train_epochs': (3.0, 'epochs over the training split'),
  'batch_size': (32, SHARED['batch_size'][1]),
  'learning_rate': (2e-5, SHARED['learning_rate'][1]),
  'learning_rates': ('', 'sweep of peak learning rates, such as 2e-5,3e-5,5e-5, each with every '
                         'seed'),
  'warmup_ratio': (0.1, 'fraction of the steps used for linear warm-up'),
  'class_weights': ('', "class weights of the loss: 'balanced', or one number per class, such as "
                        '1.0,2.5'),
  'data.source': ('', "directory in the task's official layout, or tfds:NAME"),
  'data.prepared': ('', 'training set written by `bertjax prepare` with this config; empty = '
                        'encoded at the start'),
  'data.train_file': ('', 'file of the training split: a path, or a name in data.source'),
  'data.dev_file': ('', 'file of the dev split: a path, or a name in data.source'),
  'data.test_file': ('', 'file of the test split: a path, or a name in data.source'),
  'data.dev_fraction': (0.1, 'fraction of the training examples held out, by a hash of their '
                             'texts, if the task has no dev split'),
  'data.buckets': ('32,48,64,96,128,192,256,384', 'batch lengths in tokens, without packing'),
  'data.packed_length': (-1, 'row length in tokens for packed examples; 0 = no packing, -1 = '
                             'data.length, at least 128'),
  'data.train': ('train', 'split to train on'),
  'data.dev': ('dev', 'split to evaluate on'),
  'data.test': ('test', 'split to predict at the end, if the source has it; empty = none'),
  'data.max_train_examples': (0, 'maximum number of training examples, a random subset by `seed`; '
                                 '0 = all'),
  'span_loss_includes_padding': (False, "softmax of the SQuAD loss over padding too, as Google's; "
                                        'without buckets'),
  'log_every': (50, SHARED['log_every'][1]),
  'eval_every': (0, 'steps between evaluations; 0 = after each epoch'),
  'save_every': (0, 'steps between checkpoints; 0 = at evaluations only'),
  'max_to_keep': (1, SHARED['max_to_keep'][1]),
  'save_model': ('best', "step saved as model/: 'best' by the task's metric, or 'last'"),
}  # fmt: skip

# Options of tasks; `tasks.make_task` accepts those of the task at hand.
FINETUNING |= {
  'task.text': ('', 'column of the text (table), of the anchor (embed) or of the query (rerank); a '
                    'number from 0 in a file without a header'),
  'task.pair': ('', 'column of the second text of a sentence pair (table), of the positive (embed, '
                    'rerank) or of the document of a labelled pair (rerank)'),
  'task.label': ('label', 'column of the label (table, choice, rerank), or of the score of a pair '
                          "(embed); columns of the teacher's scores, joined by '|' (rerank with "
                          'margin_mse)'),
  'task.kind': ('class', "kind of label: 'class', 'regression' or 'multilabel' (table)"),
  'task.labels': ('', "label names joined by '|' (table); empty = those of the training split"),
  'task.separator': ('|', 'separator of the labels in a multilabel field (table)'),
  'task.prompt': ('', 'column of the text that every ending completes (choice)'),
  'task.endings': ('', "columns of the endings, joined by '|' (choice)"),
  'task.start': ('', 'column of the text in front of every ending (choice)'),
  'task.delimiter': ('', 'delimiter between columns (table, choice, embed, rerank): a character, '
                         'or tab, comma, semicolon, pipe, space; empty = detect'),
  'task.encoding': ('utf-8', 'encoding of text files by its Python name (table, choice, conll, '
                             'embed, rerank)'),
  'task.on_bad_row': ('stop', "records without text or label (table, choice, embed, rerank): "
                              "'stop', or 'skip' and count them"),
  'task.negatives': ('', "columns of hard negatives, joined by '|' (embed, rerank); in JSONL and "
                         'Parquet a column may hold a list'),
  'task.num_negatives': (0, 'hard negatives of an example (embed, rerank), the first ones of '
                            'longer lists; 0 = one for each column'),
  'task.loss': ('contrastive', "loss (embed): 'contrastive' (in-batch negatives) or 'cosine' "
                               "(scores of pairs); (rerank): 'binary' (each pair), 'listwise' "
                               '(softmax over a positive and its negatives) or '
                               "'margin_mse' (a teacher's scores)"),
  'task.evaluation': ('retrieval', "evaluation (embed, rerank): 'retrieval' among the texts of the "
                                   "split (embed) or of each query (rerank), 'similarity' (scored "
                                   "pairs) or 'beir' (the file is FOLDER/qrels/NAME.tsv)"),
  'task.candidates': ('', 'file of the candidates to rank (rerank with beir), in data.source: a '
                          'run in the format of trec_eval, or a table with query-id, corpus-id '
                          'and, if there is one, score'),
  'task.num_candidates': (100, 'candidates of a query that are ranked (rerank with beir), those '
                               'with the highest scores'),
  'task.max_score': (1.0, 'score of a pair that stands for a cosine of 1 (embed); 5.0 for STS-B'),
  'task.temperature': (0.05, 'temperature of the contrastive loss, the inverse of its scale '
                              '(embed)'),
  'task.symmetric': (False, 'contrastive loss in both directions, of anchors and of positives '
                            '(embed)'),
  'task.widths': ('', "widths of Matryoshka vectors beside the full one, joined by '|' (embed)"),
  'task.pooling': ('', "pooling of embeddings (embed): 'mean', 'cls' or 'last'; empty = that of "
                       "the model's files, else 'mean'"),
  'task.query_prompt': ('', 'text in front of anchors, queries and scored texts (embed); empty = '
                            "the 'query' prompt of the model's files"),
  'task.document_prompt': ('', 'text in front of positives, negatives and documents (embed); empty '
                               "= the 'document' prompt of the model's files"),
  'task.types': ('', "entity types joined by '|' (conll); empty = those of the training split"),
  'task.word': (0, 'column of the word, from 0 (conll)'),
  'task.tag': (-1, 'column of the tag, from 0 (conll); -1 = the last'),
  'task.context': (False, 'sequences filled with the sentences around in the document (conll2003, '
                          'conll)'),
  'task.stride': (128, 'tokens from one window of a context to the next (squad1, squad2)'),
  'task.max_query': (64, 'maximum tokens of a question (squad1, squad2)'),
  'task.nbest': (20, 'candidate answers per question (squad1, squad2)'),
  'task.max_answer': (0, 'maximum tokens of an answer (squad1, squad2); 0 = 30, cmrc2018 50'),
  'task.scorer': ('squad', "comparison of answers: 'squad', or 'cmrc2018' for Chinese (squad1, "
                           'squad2)'),
  'task.format': ('prose', 'format of the text, such as data.format of pre-training '
                           '(sentence_order, next_sentence)'),
  'task.seed': (0, 'seed of the choice of wrong pairs (sentence_order, next_sentence)'),
}  # fmt: skip

_ENCODER = {f'model.{f.name}': (f.default, f.metadata['help'])
            for f in dataclasses.fields(model_config.EncoderConfig)}  # fmt: skip
# A stage of a pre-training run: field -> (default, help), as above.
STAGE = {
  'steps': (0, 'number of steps; 0 = those that the other stages leave of num_train_steps'),
  'batch_size_warmup_steps': (0, 'steps in which the batch grows to its size in three doublings, '
                                 'from an eighth of it; 0 = none'),
  'schedule': ('', "learning rate of the stage: a name as in schedule; empty in all stages = the "
                   "run's schedule over all steps"),
  'start_factor': (0.0, 'learning rate at the start of the stage as a fraction of the peak; 0.0 = '
                        'that at the end of the stage before'),
  'end_factor': (0.0, 'learning rate at the end of a decay as a fraction of the peak'),
}  # fmt: skip
OF_TASKS = (*model_config.HEAD_FIELDS, 'frozen')  # fields of EncoderConfig for fine-tuning only
PRETRAINING |= {n: f for n, f in _ENCODER.items() if n.partition('.')[2] not in OF_TASKS}
for _name, _field in REPLACED.items():
  _default, _help = PRETRAINING[_field]
  _empty = type(_default)()
  STAGE[_name] = (_empty, f"the stage's {_field}: {_help}; {_empty if _empty != '' else 'empty'} = "
                          'as the run')  # fmt: skip
for _name in (*model_config.HEAD_FIELDS, 'dtype', 'attention', 'remat'):
  FINETUNING[f'model.{_name}'] = _ENCODER[f'model.{_name}']
FINETUNING['model.unroll'] = (1, _ENCODER['model.unroll'][1])  # a program for each length
for _name in ('hidden_dropout', 'attention_dropout', 'classifier_dropout'):
  _help = _ENCODER[f'model.{_name}'][1].partition(';')[0]
  FINETUNING[f'model.{_name}'] = (-1.0, f'{_help}; -1.0 = as the model was trained')
