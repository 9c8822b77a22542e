"""Everything that drives or changes DeepSpeed; what only reads its marks is in :mod:`ds_lowrank.placement`.

What we change on objects that are not ours, all of it, and where. Importing the package changes nothing.

=================================================  ====================================================================
what                                               why, and who does it
=================================================  ====================================================================
``torch.optim.<method>``                           DeepSpeed looks unknown names up there: ``register``, when called
``deepspeed.initialize``                           so that the Trainer and accelerate call ours, which checks and
                                                   passes on what is not for it: ``register``, when called
``ZERO_SUPPORTED_OPTIMIZERS`` of DeepSpeed         the list of what ZeRO may wrap: ``register`` and ``initialize``
``engine.clip_fp32_gradients``,                    fp32 at ZeRO 0 on a grid: DeepSpeed 0.19.8 leaves shards out of the
``engine.gradient_clipping``                       norm: ``clipping.repair_clipping``, on engines of ``initialize``
``engine.optimizer.step``                          at ZeRO 3, and with offload, DeepSpeed 0.19.8 steps with gradients
                                                   of another step: ``gradient_buffers``, on engines of ``initialize``
``engine.no_sync``                                 refuses: nothing is reduced before a step under projected reduction:
                                                   ``projected``, on engines of ``initialize``
``engine.save_checkpoint``,                        checkpoints that open on any grid: ``engine_checkpoints``, on engines
``engine.load_checkpoint``                         of ``initialize``; files of DeepSpeed's of another layout are refused
                                                   before it fails on the size of a tensor: ``saved_layout``
``engine.checkpoint_engine.load``                  DeepSpeed 0.19.8 runs what a checkpoint's pickles name: within
                                                   ``checkpoint/restricted_load.py``, and put back
``engine.checkpoint_engine.save``                  a full disk on one rank would hang the others: within
                                                   ``checkpoint/deferred.py``, and put back
``engine.engine_timers``                           adds a timer of reductions to a list: within ``reduction_time.py``,
                                                   on logged steps of the programs of ``launch/``, and removes it
``engine.monitor.enabled``                         ``eval_batch`` would report a check of the weights as an evaluation:
                                                   within ``training/health.py``, and put back
``deepspeed.ops.__compatible_ops__``               keeps a CPU job from compiling an extension at its first collective:
                                                   ``training/distributed.py``, only in the programs of ``launch/``
=================================================  ====================================================================
"""
