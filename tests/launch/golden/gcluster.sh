gcluster job submit --name=audit --cluster=cluster --location=us-east5 --image=image:1 \
  --compute-type=v6e-16 --num-slices=2 --mount=gs://bucket:/data:rw --grace-period=2m \
  --command=relearn\ audit\ --config=configs/names.py\ --workdir=/data/runs/names\ --config.seeds=\\\(0\\\,\\\ 1\\\)
