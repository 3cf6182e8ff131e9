set -u
bash .carry/vllm/install.sh vllm && . /tmp/site/vllm/env.sh || exit 3
T=$(python3 -c "import random; random.seed(3); print(','.join(str(random.randrange(128)) for _ in range(33)))")
echo "tokens $T"
mkdir -p /tmp/o
python3 scripts/fp8_checkpoints.py /tmp/m/small
python3 scripts/fp8_checkpoints.py /tmp/m/big --hidden 896 --ffn 4864 --heads 14 --kv-heads 2 --layers 2 --vocabulary 1024
(cd /tmp/m && sha256sum */*/model.safetensors) | tee $OUT/models.txt
one() {
  python3 adapters/vllm_sites.py --model /tmp/m/$1/$2 --tokens $T --decode $3 --batch ${4:-1} --memory 0.15 --cache 1 --out /tmp/o/$1-$2-$3.safetensors > /tmp/o/$1-$2-$3.log 2>&1
  echo "$1 $2 $3 rc $? $SECONDS s"; grep -h "Selected\|Error" /tmp/o/$1-$2-$3.log | cut -c1-220 | tail -3
}
i=0
for size in small big; do for form in channel tensor static fp8-static fp8-dynamic block int8; do
  one $size $form 7 &
  i=$((i+1)); [ $((i%5)) = 0 ] && wait
done; done; wait
cd /tmp/o && tail -n 25 *.log > logs.txt; tar cf - *.safetensors logs.txt | xz -T8 -1 > /tmp/all.tar.xz; ls -la /tmp/all.tar.xz; split -b 15900000 /tmp/all.tar.xz $OUT/all.part.
