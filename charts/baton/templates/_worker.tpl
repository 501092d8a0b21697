{{/* A Deployment of workers and the headless Service that metrics are scraped through:
     dict "root" $ "component" "prefill" "values" .Values.prefill. */}}
{{- define "baton.worker" -}}
{{- $root := .root }}
{{- $values := .values }}
{{- $image := include "baton.image" (dict "root" $root "image" $values.image) }}
{{- $rdma := $root.Values.rdma }}
apiVersion: apps/v1
kind: Deployment
metadata:
  {{- include "baton.metadata" . | nindent 2 }}
spec:
  {{- $scaled := $values }}
  {{- /* An upgrade leaves alone what the planner has set. */}}
  {{- if $root.Values.planner.enabled }}
  {{- with lookup "apps/v1" "Deployment" $root.Release.Namespace (printf "%s-%s" (include "baton.fullname" $root) .component) }}
  {{- $scaled = merge (dict "replicas" .spec.replicas) $values }}
  {{- end }}
  {{- end }}
  {{- with include "baton.replicas" $scaled | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with $values.updateStrategy }}
  strategy:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- /* Copying and loading may take long; the startup probe is what gives up. */}}
  progressDeadlineSeconds: {{ add $values.startupTimeoutSeconds 1800 }}
  selector:
    matchLabels:
      {{- include "baton.selectorLabels" . | nindent 6 }}
  template:
    metadata:
      {{- include "baton.podMetadata" . | nindent 6 }}
    spec:
      {{- include "baton.podSpec" . | nindent 6 }}
      {{- /* SIGTERM is the drain: the worker leaves the registry's choice at once and finishes what it has. */}}
      terminationGracePeriodSeconds: {{ add (ceil ($values.config.drainTimeoutS | default 30)) 30 }}
      {{- with include "baton.modelFetch" (dict "root" $root "image" $image) | trim }}
      {{- . | nindent 6 }}
      {{- end }}
      containers:
        - name: {{ .component }}
          image: {{ $image }}
          imagePullPolicy: {{ $root.Values.image.pullPolicy }}
          args:
            - {{ .component }}
            {{- with $values.extraArgs }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          env:
            {{- include "baton.commonSettings" $root | nindent 12 }}
            {{- include "baton.modelSettings" $root | nindent 12 }}
            - name: BATON_DEVICE
              value: {{ $root.Values.device }}
            - name: BATON_DTYPE
              value: {{ $root.Values.model.dtype }}
            - name: BATON_WORKER_ID
              valueFrom:
                fieldRef: {fieldPath: metadata.name}
            - name: BATON_WORKER_HOST
              valueFrom:
                fieldRef: {fieldPath: status.podIP}
            - name: BATON_WORKER_PORT
              value: "50053"
            {{- with include "baton.settings" $values.config | trim }}
            {{- . | nindent 12 }}
            {{- end }}
            {{- $ucx := dict }}
            {{- if $rdma.enabled }}
            {{- with $rdma.netDevices }}{{ $_ := set $ucx "UCX_NET_DEVICES" . }}{{ end }}
            {{- with $rdma.transports }}{{ $_ := set $ucx "UCX_TLS" . }}{{ end }}
            {{- end }}
            {{- range $name, $value := mergeOverwrite $ucx $root.Values.ucx }}
            - name: {{ $name }}
              value: {{ include "baton.scalar" $value | quote }}
            {{- end }}
            {{- with $values.extraEnv }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          ports:
            - {name: grpc, containerPort: 50053}
            - {name: metrics, containerPort: 9090}
          startupProbe:
            {{- include "baton.grpcProbe" (dict "root" $root "port" 50053 "path" "/ready") | nindent 12 }}
            periodSeconds: 2
            timeoutSeconds: 2
            failureThreshold: {{ div $values.startupTimeoutSeconds 2 }}
          readinessProbe:
            {{- include "baton.grpcProbe" (dict "root" $root "port" 50053 "path" "/ready") | nindent 12 }}
            periodSeconds: 5
            timeoutSeconds: 5
          livenessProbe:
            {{- include "baton.grpcProbe" (dict "root" $root "port" 50053 "path" "/live") | nindent 12 }}
            periodSeconds: 10
            timeoutSeconds: 10
            failureThreshold: 6
          resources:
            {{- $resources := deepCopy $values.resources }}
            {{- if $rdma.enabled }}
            {{- $nics := dict "limits" $rdma.resources "requests" $rdma.resources }}
            {{- $resources = mergeOverwrite $resources (deepCopy $nics) }}
            {{- end }}
            {{- toYaml $resources | nindent 12 }}
          securityContext:
            {{- $capabilities := ternary (list "IPC_LOCK") list $rdma.enabled }}
            {{- include "baton.containerSecurity" (dict "values" $values "capabilities" $capabilities) | nindent 12 }}
          volumeMounts:
            - {name: tmp, mountPath: /tmp}
            {{- with include "baton.internalTlsMount" $root | trim }}
            {{- . | nindent 12 }}
            {{- end }}
            - {name: shm, mountPath: /dev/shm}
            {{- with include "baton.modelMount" $root | trim }}
            {{- . | nindent 12 }}
            {{- end }}
            {{- with $values.extraVolumeMounts }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
      volumes:
        - name: tmp
          emptyDir: {}
        {{- with include "baton.internalTlsVolume" $root | trim }}
        {{- . | nindent 8 }}
        {{- end }}
        - name: shm
          emptyDir: {medium: Memory, sizeLimit: {{ $root.Values.shm.size }}}
        {{- with include "baton.modelVolume" (dict "root" $root "cache" (include "baton.modelCacheClaim" $root)) | trim }}
        {{- . | nindent 8 }}
        {{- end }}
        {{- with $values.extraVolumes }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
---
apiVersion: v1
kind: Service
metadata:
  {{- include "baton.metadata" . | nindent 2 }}
spec:
  clusterIP: None
  selector:
    {{- include "baton.selectorLabels" . | nindent 4 }}
  ports:
    - {name: grpc, port: 50053, targetPort: grpc, appProtocol: kubernetes.io/h2c}
    - {name: metrics, port: 9090, targetPort: metrics, appProtocol: http}
{{- end }}
