gcloud compute tpus queued-resources create audit --zone=us-east5-b --accelerator-type=v6e-16 \
  --runtime-version=v2-alpha-tpuv6e --node-id=audit --spot
gcloud compute tpus queued-resources describe audit --zone=us-east5-b --format='value(state.state)'  # until ACTIVE
gcloud compute tpus tpu-vm ssh audit --zone=us-east5-b --worker=all --command=sudo\ mkdir\ -p\ /data\ \&\&\ \{\ mountpoint\ -q\ /data\ \|\|\ sudo\ mount\ -t\ nfs\ 10.0.0.2:/share\ /data\;\ \}\ \&\&\ pip\ install\ -q\ \'/data/src/relearn_jax\[tpu\]\'
gcloud compute tpus tpu-vm ssh audit --zone=us-east5-b --worker=all --command=while\ :\;\ do\ relearn\ audit\ --config=configs/names.py\ --workdir=/data/runs/names\ --config.seeds=\\\(0\\\,\\\ 1\\\)\ \;\ status=\$\?\;\ \[\ \$status\ =\ 75\ \]\ \|\|\ exit\ \$status\;\ sleep\ 5\;\ done &
wait
