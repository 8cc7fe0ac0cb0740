# The image of all nodes, for clusters/*.yaml: Ray, torch and tfkd, in the versions of constraints.txt.
#
#   docker build -t registry.example.com/tfkd_ray:0.1.0-ray2.60.0-py311-torch2.14.1 .
#
# Machines with GPUs need NVIDIA's driver 580 or later and NVIDIA's container toolkit.
FROM rayproject/ray:2.60.0-py311-gpu
# torch.compile needs a C++ compiler and Python's headers, which are in the base image's Python
RUN sudo apt-get update -q && sudo apt-get install -qy --no-install-recommends g++ && sudo rm -rf /var/lib/apt/lists/*
COPY --chown=ray . /home/ray/tfkd_ray
RUN pip install --no-cache-dir --constraint /home/ray/tfkd_ray/constraints.txt /home/ray/tfkd_ray
