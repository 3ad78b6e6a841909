import sys, traceback, time
from libraries.model_families import *
def many(names, way):
    out={}
    import warnings; warnings.simplefilter("ignore")
    import transformers; transformers.logging.set_verbosity_error()
    for n in names:
        t=time.time()
        try: out[n]=train(n,way)
        except BaseException as e:
            return {**out, n: f"{type(e).__name__}: {str(e)[:600]}\n"+"".join(traceback.format_exc()[-1800:])}
        object.__setattr__(out[n],"seconds",time.time()-t)
    return out
