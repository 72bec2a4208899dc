gcloud compute tpus queued-resources create audit --zone=us-east5-a --accelerator-type=v5p-16 \
  --runtime-version=v2-alpha-tpuv5 --node-count=2 --node-prefix=audit --spot
gcloud compute tpus queued-resources describe audit --zone=us-east5-a --format='value(state.state)'  # until ACTIVE
gcloud compute tpus tpu-vm ssh audit-0 --zone=us-east5-a --worker=all --command=sudo\ mkdir\ -p\ /data\ \&\&\ \{\ mountpoint\ -q\ /data\ \|\|\ sudo\ mount\ -t\ nfs\ 10.0.0.2:/share\ /data\;\ \}\ \&\&\ pip\ install\ -q\ \'/data/src/relearn_jax\[tpu\]\'
gcloud compute tpus tpu-vm ssh audit-1 --zone=us-east5-a --worker=all --command=sudo\ mkdir\ -p\ /data\ \&\&\ \{\ mountpoint\ -q\ /data\ \|\|\ sudo\ mount\ -t\ nfs\ 10.0.0.2:/share\ /data\;\ \}\ \&\&\ pip\ install\ -q\ \'/data/src/relearn_jax\[tpu\]\'
gcloud compute tpus tpu-vm ssh audit-0 --zone=us-east5-a --worker=all --command=while\ :\;\ do\ relearn\ audit\ --config=configs/names.py\ --workdir=/data/runs/names\ --config.seeds=\\\(0\\\,\\\ 1\\\)\ \;\ status=\$\?\;\ \[\ \$status\ =\ 75\ \]\ \|\|\ exit\ \$status\;\ sleep\ 5\;\ done &
gcloud compute tpus tpu-vm ssh audit-1 --zone=us-east5-a --worker=all --command=while\ :\;\ do\ relearn\ audit\ --config=configs/names.py\ --workdir=/data/runs/names\ --config.seeds=\\\(0\\\,\\\ 1\\\)\ \;\ status=\$\?\;\ \[\ \$status\ =\ 75\ \]\ \|\|\ exit\ \$status\;\ sleep\ 5\;\ done &
wait
